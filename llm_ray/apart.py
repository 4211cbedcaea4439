"""Runs calls in a separate process: they do not block this one, and if the cluster dies, Ray ends only that process.

with apart(plan_report, conf) as work:      # the process ends with the block
    for line in work.lines():
        print(line)
    report = work.result()

process = Apart()                           # for consecutive calls
overview = process.call(cluster.overview, home, address, timeout=20)     # cluster.overview(home, address, reporter=…)

python -m llm_ray.apart is the child process: it reads pickled calls from stdin and writes progress and results to
stdout.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import psutil

from llm_ray.errors import ClusterError, LlmRayError, RunError
from llm_ray.progress import Kind, Reporter, Silent

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_AT_WORK: set[Apart] = set()


class _Ended(Exception):
    """The process ended during a call, with this exit code."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class Apart:
    """A child process that makes one call at a time. The first call starts it; if the parent ends, it completes the
    current call."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._lock = threading.Lock()

    def call(
        self,
        function: Callable[..., T],
        *arguments: Any,
        reporter: Reporter | None = None,
        timeout: float | None = None,
    ) -> T:
        """Returns the result of `function(*arguments, reporter=…)`. Raises the function's LlmRayError, and ClusterError
        if the process dies with Ray or does not answer within `timeout` seconds; the process is then killed."""
        with self._lock, contextlib.closing(_Bars(reporter or Silent())) as bars:
            try:
                for kind, value in self.events(function, *arguments, timeout=timeout):
                    if kind == "returned":
                        result: T = value
                        return result
                    bars.take(kind, value)
            except (queue.Empty, BrokenPipeError) as error:
                self._end()
                raise ClusterError(
                    f"Ray does not answer within {timeout or 0:.0f} s: the cluster is unreachable or very busy"
                ) from error
            except ClusterError:
                self._end()  # the next call reconnects
                raise
            except _Ended:
                self._end()
            raise ClusterError("the connection to Ray was lost: the cluster is unreachable, or has just been stopped")

    def events(
        self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Starts a call; yields its progress events, then `returned` with the result. Raises the function's
        LlmRayError, _Ended if the process ends, and queue.Empty after `timeout` seconds."""
        process = self._begun()
        pickle.dump((function, arguments), process.stdin)  # type: ignore[arg-type]
        process.stdin.flush()  # type: ignore[union-attr]
        return self._until_returned(process, time.monotonic() + timeout if timeout else None)

    def _until_returned(self, process: subprocess.Popen[bytes], end: float | None) -> Iterator[tuple[str, Any]]:
        while True:
            kind, value = self._answers.get(timeout=max(0.0, end - time.monotonic()) if end else None)
            if kind == "failed":
                raise value
            if kind == "ended":
                raise _Ended(process.wait())
            yield kind, value
            if kind == "returned":
                return

    def close(self) -> None:
        """Ends the process after its current call."""
        with self._lock:
            if self._process and self._process.stdin:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()

    def kill(self) -> None:
        """Kills the process and its descendants."""
        begun: list[psutil.Process] = []
        if self._process:
            with contextlib.suppress(psutil.NoSuchProcess):
                begun = psutil.Process(self._process.pid).children(recursive=True)
        for each in begun:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self._end()

    def _end(self) -> None:
        """Kills only the process itself: a Ray that it started for a deployment must survive it."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()

    def _begun(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None or self._process.stdin.closed:  # type: ignore[union-attr]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llm_ray.apart"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            self._answers = queue.Queue()
            threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        return self._process


class Work(Generic[T]):
    """A call in its own process: progress lines as they arrive, then the result."""

    def __init__(self, events: Iterator[tuple[str, Any]]) -> None:
        self._events = events
        self._result: list[T] = []

    def lines(self) -> Iterator[str]:
        """Yields progress lines until the call returns. Raises the call's LlmRayError, and RunError if its process
        ends."""
        try:
            for kind, value in self._events:
                if kind == "line":
                    yield value[0]
                elif kind == "bar":
                    yield value[1]
                elif kind == "returned":
                    self._result.append(value)
        except _Ended as end:
            killed = "it was killed, perhaps because memory ran out"
            why = killed if end.code == -9 else f"its process ended with code {end.code}"
            raise RunError(f"the work was interrupted: {why}") from None

    def result(self) -> T:
        """Returns the result of the call. Raises the call's LlmRayError, and RunError if its process ended."""
        for _ in self.lines():
            pass
        if not self._result:
            raise RunError("the work was interrupted before it finished")
        return self._result[0]


@contextlib.contextmanager
def apart(function: Callable[..., T], *arguments: Any) -> Iterator[Work[T]]:
    """Starts `function(*arguments, reporter=…)` in its own process, which is killed when the block ends. Function,
    arguments and result are pickled."""
    process = Apart()
    _AT_WORK.add(process)
    try:
        yield Work(process.events(function, *arguments))
    finally:
        _AT_WORK.discard(process)
        process.kill()


def end_all() -> None:
    """Kills all processes started by `apart`. Called at exit, which would otherwise wait for threads that wait for
    them."""
    for process in list(_AT_WORK):
        process.kill()


def _read(process: subprocess.Popen[bytes], answers: queue.Queue[tuple[str, Any]]) -> None:
    with contextlib.suppress(EOFError, OSError, ValueError, pickle.UnpicklingError):
        while True:
            answers.put(pickle.load(process.stdout))  # type: ignore[arg-type]  # noqa: S301  # of our own child
    answers.put(("ended", None))
    process.wait()


class _Bars:
    """Forwards progress events of the child process to a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._open = reporter, dict[int, tuple[Any, contextlib.ExitStack]]()

    def take(self, kind: str, value: Any) -> None:
        if kind == "line":
            self._reporter.line(*value)
        elif kind == "bar":
            number, title, total = value
            stack = contextlib.ExitStack()
            self._open[number] = stack.enter_context(self._reporter.bar(title, total)), stack
        elif kind == "update":
            number, *progress = value
            self._open[number][0].update(*progress)
        else:
            self._open.pop(value)[1].close()

    def close(self) -> None:
        for _, stack in self._open.values():
            stack.close()


class _Teller:
    """The reporter in the child process."""

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        self._tell, self._bars = tell, 0

    def line(self, text: str, kind: Kind = "plain") -> None:
        self._tell("line", (text, kind))

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[_Bar]:
        self._bars += 1
        bar = _Bar(self._tell, self._bars)
        self._tell("bar", (bar.number, title, total))
        try:
            yield bar
        finally:
            self._tell("closed", bar.number)


@dataclass
class _Bar:
    tell: Callable[[str, Any], None]
    number: int
    last: float = 0.0

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        if time.monotonic() - self.last > 0.2 or done == total:
            self.last = time.monotonic()
            self.tell("update", (self.number, done, total, text))


def main() -> None:
    """Makes calls read from stdin until it is closed."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not mix with the answers

    def tell(kind: str, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone; complete the work anyway
            pickle.dump((kind, value), out)
            out.flush()

    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301  # of our own parent
        except EOFError:
            return
        try:
            tell("returned", function(*arguments, reporter=_Teller(tell)))
        except LlmRayError as error:
            tell(
                "failed",
                type(error)(str(error)) if type(error).__init__ is Exception.__init__ else LlmRayError(str(error)),
            )
        except Exception as error:
            _LOG.exception(f"in a call apart: {function}")
            tell("failed", LlmRayError(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    from llm_ray.apart import main as run

    run()
