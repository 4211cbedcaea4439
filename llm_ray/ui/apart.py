"""Processes of the page for what needs Ray: a program that is connected to a cluster that dies is ended by Ray, and a
page is not to be.

    apart = Apart()
    overview = apart.call(cluster.overview, home, address, timeout=20)     # cluster.overview(home, reporter, address)

python -m llm_ray.ui.apart is such a process: pickled calls come in, what the reporter is told and what they return goes
out.
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
from typing import Any

from llm_ray.errors import ClusterError, LlmRayError
from llm_ray.progress import Kind, Reporter, Silent

_LOG = logging.getLogger("llm_ray.ui")
_ENDED = ("ended", None)


class Apart:
    """A process that makes calls one after the other. The first begins it; it goes on to the end of its call when the
    page ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._lock = threading.Lock()

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        reporter: Reporter | None = None,
        timeout: float | None = None,
    ) -> Any:
        """What `function(*arguments, reporter=…)` returns. Raises its LlmRayError; ClusterError where the process dies
        with Ray, or does not answer within `timeout` seconds: it is then ended."""
        with self._lock:
            process = self._begun()
            bars = _Bars(reporter or Silent())
            end = time.monotonic() + timeout if timeout else None
            try:
                pickle.dump((function, arguments), process.stdin)  # type: ignore[arg-type]
                process.stdin.flush()  # type: ignore[union-attr]
                while True:
                    kind, value = self._answers.get(timeout=max(0.0, end - time.monotonic()) if end else None)
                    if kind == "returned":
                        return value
                    if kind == "failed":
                        raise value
                    if kind == "ended":
                        raise ClusterError(
                            "the connection to Ray ended in the middle: the cluster is away, or has just been stopped"
                        )
                    bars.told(kind, value)
            except (queue.Empty, BrokenPipeError) as error:
                self._end()
                raise ClusterError(
                    f"Ray does not answer within {timeout or 0:.0f} s: the cluster is away, or very busy"
                ) from error
            except ClusterError:
                self._end()  # the next call joins anew
                raise
            finally:
                bars.close()

    def close(self) -> None:
        """End the process; what it does goes on to its end."""
        with self._lock:
            if self._process and self._process.stdin:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()

    def _begun(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None or self._process.stdin.closed:  # type: ignore[union-attr]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llm_ray.ui.apart"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            self._answers = queue.Queue()
            threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        return self._process

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


def _read(process: subprocess.Popen[bytes], answers: queue.Queue[tuple[str, Any]]) -> None:
    with contextlib.suppress(EOFError, OSError, ValueError, pickle.UnpicklingError):
        while True:
            answers.put(pickle.load(process.stdout))  # type: ignore[arg-type]  # noqa: S301  # of our own child
    answers.put(_ENDED)
    process.wait()


class _Bars:
    """Hands what the other process tells to a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._open = reporter, dict[int, tuple[Any, contextlib.ExitStack]]()

    def told(self, kind: str, value: Any) -> None:
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
    """The reporter in the other process."""

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
    """Make the calls that come in, until no more do."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(kind: str, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the page is gone; the work is done all the same
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
            _LOG.exception(f"in a call of the page: {function}")
            tell("failed", LlmRayError(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    from llm_ray.ui.apart import main as run

    run()
