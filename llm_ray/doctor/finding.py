"""The result of a check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]
"""note: works, but slower or with less than possible; problem: something will fail."""
LEVELS: tuple[Level, ...] = ("ok", "note", "problem")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    group: str
    check: str
    level: Level
    text: str
    """The state or the fault."""
    fix: str = ""
    """The remedy, as a command if possible. Never empty unless the level is ok."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The facts as numbers, for programs."""
    host: str = ""
    """The cluster node that it is about; empty for this host."""


def gib(size: float) -> str:
    """Formats bytes: 512 MiB, 2.5 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
