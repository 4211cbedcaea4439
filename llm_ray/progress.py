"""Protocols for reporting the progress of long-running work, implemented for a terminal, a page, a log, or no
output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal, Protocol

Kind = Literal["plain", "heading", "warning"]


class Bar(Protocol):
    """Progress of one task."""

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        """Shows `done` of `total`, with `text` beside it."""


class Reporter(Protocol):
    """Receives lines and progress bars. Only thread-safe implementations may be shared by threads."""

    def line(self, text: str, kind: Kind = "plain") -> None:
        """Shows one or several lines (separated by line breaks)."""

    def bar(self, title: str, total: int | None = None) -> AbstractContextManager[Bar]:
        """Shows a bar while the block runs; `total` is None if unknown."""


class Silent:
    """Shows nothing."""

    def line(self, text: str, kind: Kind = "plain") -> None:
        pass

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        yield self

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        pass


def duration(seconds: float | None) -> str:
    """Formats seconds in a suitable unit; empty for None."""
    if seconds is None:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
