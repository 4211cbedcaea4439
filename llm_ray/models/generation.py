"""Corrects a model's generation settings so that transformers saves them: it refuses to save combinations that it loads
with a warning."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

_ISSUE = re.compile(r"^- `(\w+)`: (.*)$", re.MULTILINE)


def mend(settings: GenerationConfig) -> list[str]:
    """Change `settings` as little as it takes to save them; returns what was changed, in words for the user.

    Temperatures and the like, without a word on whether to sample, mean sampling (that is how vLLM reads them). Other
    values that have no effect beside the rest are dropped. Raises ValueError, with transformers' words, for those that
    only a person can mend.
    """
    changes = []
    sampling = [name for name, reason in _without_effect(settings).items() if "`do_sample`" in reason]
    if sampling and settings.do_sample is None:
        settings.do_sample = True
        changes.append(f"do_sample true is added, because {', '.join(sampling)} require sampling")
    for name, reason in _without_effect(settings).items():
        changes.append(f"{name} {getattr(settings, name)} is removed: it has no effect ({reason})")
        setattr(settings, name, None)
    settings.validate(strict=True)
    return changes


def _without_effect(settings: GenerationConfig) -> dict[str, str]:
    """Names of settings that transformers ignores beside the others, with its reasons; it will not save them."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return dict(_ISSUE.findall(str(error)))
    return {}
