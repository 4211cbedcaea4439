"""Corrects a model's generation settings so that transformers can save them: it refuses to save combinations that it
loads with a warning."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

_ISSUE = re.compile(r"^- `(\w+)`: (.*)$", re.MULTILINE)


def mend(settings: GenerationConfig) -> list[str]:
    """Makes the smallest changes to `settings` that let transformers save them; returns the changes as messages for the
    user.

    Sampling parameters without `do_sample` imply sampling (as vLLM reads them). Other values without effect are
    removed. Raises ValueError, with transformers' message, for settings that need a manual fix.
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
    """Returns the settings that transformers ignores, and so refuses to save, with its reasons."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return dict(_ISSUE.findall(str(error)))
    return {}
