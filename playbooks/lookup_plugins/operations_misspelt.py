"""operations_misspelt: finds misspelled names given by -e, which resemble but are not arguments of the playbook.

Its terms are the playbook's arguments. With kind (finetune, serve) and conf, keys of that conf and variables of its
template are also accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.plugins.lookup import LookupBase
from ansible.utils.vars import load_extra_vars

_BUNDLE = Path(__file__).parents[2]


def misspelt(given: Iterable[Any], arguments: Sequence[str], known: Callable[[str], bool]) -> list[str]:
    """Returns the problems of the given names; `known` returns whether a name is valid for something else."""
    problems = []
    for name in sorted(map(str, given)):
        near = difflib.get_close_matches(name.lower(), arguments, 1, 0.75)
        if near and name not in arguments and not known(name):
            problems.append(f"-e {name}: no such argument: did you mean -e {near[0]}=…?")
    return problems


def variables_of_roles() -> set[str]:
    """Returns the variables in the roles' argument_specs."""
    specs = [
        yaml.safe_load(path.read_text())["argument_specs"] for path in _BUNDLE.glob("roles/*/meta/argument_specs.yml")
    ]
    return {name for spec in specs for entry in spec.values() for name in entry.get("options") or ()}


def names_of_conf(kind: str, conf: str) -> Callable[[str], bool]:
    """Returns a predicate that tells whether a name is a key of the conf or a variable of its template. If the template
    cannot be read, only keys are recognized (rendering the conf reports that error); if llm_ray is not installed, every
    name is accepted."""
    try:
        from llm_ray.conf.keys import FINETUNE, SERVE
        from llm_ray.conf.load import find
        from llm_ray.conf.render import TemplateProblem, variables
        from llm_ray.errors import LlmRayError
    except ImportError:
        return lambda name: True
    keys = FINETUNE if kind == "finetune" else SERVE
    own = _BUNDLE / "conf" / kind / f"{conf}.yaml.j2"
    try:
        used = variables((own if own.is_file() else find(conf, kind)).read_text(encoding="utf-8-sig"))
    except (LlmRayError, TemplateProblem, UnicodeDecodeError, OSError):
        used = set()
    return lambda name: name in used or bool(keys.paths(name, section=True))


class LookupModule(LookupBase):
    """Entry point for Ansible."""

    def run(self, terms: Sequence[str], variables: Any = None, kind: str = "", conf: Any = "", **_: Any) -> list[str]:
        of_roles = variables_of_roles()
        of_conf = names_of_conf(kind, str(conf)) if kind else lambda name: False
        return misspelt(load_extra_vars(self._loader), list(terms), lambda name: name in of_roles or of_conf(name))
