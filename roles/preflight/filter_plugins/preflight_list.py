"""Formats preflight's findings: {{ problems | preflight_list(hosts) }}."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

Problem = dict[str, Any]


def preflight_list(problems: Sequence[Problem], hosts: Sequence[str]) -> str:
    """Formats problems as lines of the form host: variable = value: remedy. A problem of all hosts is a single line."""
    lines = []
    for one in _merged(problems, hosts):
        value = "" if one["value"] is None else f" = {json.dumps(one['value'], default=str)}"
        lines.append(f"{one['host']}: {one['variable']}{value}: {one['fix']}")
    return "\n".join(lines)


def _merged(problems: Sequence[Problem], hosts: Sequence[str]) -> list[Problem]:
    """Merges the same finding on several hosts into one."""
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
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"preflight_list": preflight_list}
