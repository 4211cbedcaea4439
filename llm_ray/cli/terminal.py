"""Progress output on stderr, so stdout contains only the result: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llm_ray.progress import Bar, Kind

PLAIN_SECONDS = 10.0
"""Minimum time between two plain lines of a bar."""


_STYLES: dict[Kind, str | None] = {"plain": None, "heading": "bold", "warning": "yellow"}


class Terminal:
    """Prints lines and bars to stderr: a :class:`~llm_ray.progress.Reporter`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str, kind: Kind = "plain") -> None:
        self.console.print(text, style=_STYLES[kind], markup=False)

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """A progress bar, or occasional lines if stderr is not a terminal."""
        if not sys.stderr.isatty():
            yield _PlainBar(self, title)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Leave stdout alone: it may be piped.
        with Progress(*columns, console=self.console, transient=False, redirect_stdout=False) as progress:
            yield _RichBar(progress, progress.add_task(title, total=total, text=""))


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, text=text)


class _PlainBar:
    def __init__(self, reporter: Terminal, title: str) -> None:
        self._reporter, self._title, self._at = reporter, title, 0.0

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        if time.monotonic() - self._at < PLAIN_SECONDS and done != total:
            return
        self._at = time.monotonic()
        self._reporter.line(f"  {self._title} {done}{f'/{total}' if total else ''} {text}".rstrip())
