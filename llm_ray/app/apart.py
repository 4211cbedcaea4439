"""Work that takes long, in a process of its own: it holds up nobody else of this one, and ends when it is no longer
waited for.

with apart(plan_report, conf) as work:
    for line in work.lines():
        print(line)
    report = work.result()
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import psutil

from llm_ray.errors import LlmRayError, RunError
from llm_ray.progress import Bar, Kind

T = TypeVar("T")

_SPAWNED = multiprocessing.get_context("spawn")  # a fork of a process with threads may never come out of a lock
_AT_WORK: set[int | None] = set()


class Apart(Generic[T]):
    """The work of another process: its lines as they come, then what it came to."""

    def __init__(self, ours: Connection, process: Any) -> None:
        self._ours, self._process = ours, process
        self._end: tuple[str, Any] | None = None

    def lines(self) -> Iterator[str]:
        """What the work says of its progress, until it is done."""
        while self._end is None:
            try:
                kind, value = self._ours.recv()
            except EOFError:
                self._process.join()
                code = self._process.exitcode
                why = (
                    "it was killed, perhaps for want of memory" if code == -9 else f"its process ended with code {code}"
                )
                kind, value = "error", RunError(f"the work broke off: {why}")
            if kind == "line":
                yield value
            else:
                self._end = (kind, value)

    def result(self) -> T:
        """What the work came to. Raises LlmRayError as it did."""
        for _ in self.lines():
            pass
        end: tuple[str, Any] = self._end or ("error", RunError("the work has no end"))
        if end[0] == "error":
            raise end[1]
        result: T = end[1]
        return result


@contextlib.contextmanager
def apart(function: Callable[..., T], *arguments: Any) -> Iterator[Apart[T]]:
    """Begin `function(*arguments, reporter)` in a process of its own, which ends with the block. Function, arguments
    and result are pickled."""
    ours, theirs = _SPAWNED.Pipe(duplex=False)
    process = _SPAWNED.Process(
        target=_work, args=(theirs, function, arguments)
    )  # no daemon: planning has processes of its own
    process.start()
    _AT_WORK.add(process.pid)
    theirs.close()
    try:
        yield Apart(ours, process)
    finally:
        _AT_WORK.discard(process.pid)
        _kill(process.pid)
        process.join()
        ours.close()


def end_all() -> None:
    """Break off what is at work: this process is about to end, and would wait for the threads that wait for it."""
    for pid in list(_AT_WORK):
        _kill(pid)


def _kill(pid: int | None) -> None:
    """End a process and those that it has begun."""
    with contextlib.suppress(psutil.NoSuchProcess):
        begun = psutil.Process(pid)
        for each in [*begun.children(recursive=True), begun]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


class _Sent:
    """A reporter whose lines go to the process that waits. Bars are not sent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def line(self, text: str, kind: Kind = "plain") -> None:
        self._connection.send(("line", text))

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        self.line(title)
        yield self

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        pass


def _work(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        end = ("result", function(*arguments, _Sent(connection)))
    except LlmRayError as error:
        end = ("error", type(error)(str(error)))
    with contextlib.suppress(BrokenPipeError):
        connection.send(end)
    connection.close()
    os._exit(0)  # what libraries have to say at the end is of no use to anybody
