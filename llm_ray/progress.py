"""Protocols for reporting the progress of long-running work, implemented for a terminal, a page, a log, or nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal, Protocol

Kind = Literal["plain", "heading", "warning"]


class Bar(Protocol):
    """The progress of one piece of work."""

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        """Show `done` of `total`, and `text` beside it."""


class Reporter(Protocol):
    """Takes lines and bars as work goes on. One that several threads use has to be made for it."""

    def line(self, text: str, kind: Kind = "plain") -> None:
        """Show a line, or several with line breaks between them."""

    def bar(self, title: str, total: int | None = None) -> AbstractContextManager[Bar]:
        """A bar for as long as the block runs; `total` None where it is not known yet."""


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
    """Seconds in the unit that suits them."""
    if seconds is None:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
