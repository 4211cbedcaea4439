"""What preflight finds, as lines to read: {{ problems | preflight_list(hosts) }}."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

Problem = dict[str, Any]


def preflight_list(problems: Sequence[Problem], hosts: Sequence[str]) -> str:
    """The problems as lines to read: host: variable = value: what to do. One that all these hosts have is one line."""
    lines = []
    for one in _merged(problems, hosts):
        value = "" if one["value"] is None else f" = {json.dumps(one['value'], default=str)}"
        lines.append(f"{one['host']}: {one['variable']}{value}: {one['fix']}")
    return "\n".join(lines)


def _merged(problems: Sequence[Problem], hosts: Sequence[str]) -> list[Problem]:
    """The same finding on every host is one, of all."""
    by_finding: dict[str, list[Problem]] = defaultdict(list)
    for one in problems:
        by_finding[json.dumps([one["variable"], one["value"], one["fix"]], default=str)].append(one)
    return [
        found[0]
        | (
            {"host": "all"}
            if len(hosts) > 1 and len(found) == len(hosts)
            else {"host": ", ".join(one["host"] for one in found)}
        )
        for found in by_finding.values()
    ]


class FilterModule:
    """What Ansible asks a filter plugin for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"preflight_list": preflight_list}
