"""What a check has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]
"""note: it works, but slower or with less than it could; problem: something will fail."""
LEVELS: tuple[Level, ...] = ("ok", "note", "problem")


@dataclass(frozen=True)
class Finding:
    """One check's answer."""

    group: str
    check: str
    level: Level
    text: str
    """What is there, or wrong."""
    fix: str = ""
    """What to do: a command wherever there is one. Never empty where something is not ok."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The facts in numbers, for programs."""
    host: str = ""
    """Which other node of a cluster it is about; empty: this host."""


def gib(size: float) -> str:
    """Bytes in words: 512 MiB, 2.5 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
