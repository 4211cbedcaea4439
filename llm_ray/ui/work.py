"""Long-running actions started in the UI. They run in separate processes, independent of open pages; all users see
their progress."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_ray.apart import Apart
from llm_ray.errors import LlmRayError
from llm_ray.progress import Kind
from llm_ray.ui.figures import note

_KEPT = 20
_NUMBERS = itertools.count(1)


@dataclass
class Work:
    """One action; it is also the reporter of its own progress."""

    title: str
    by: str
    number: int = field(default_factory=lambda: next(_NUMBERS))
    began: float = field(default_factory=time.time)
    ended: float | None = None
    lines: list[str] = field(default_factory=list)
    now: str = "waits for earlier actions"
    problem: str = ""
    result: Any = None

    @property
    def state(self) -> str:
        if self.ended is None:
            return self.now or "runs"
        return "failed" if self.problem else "done"

    def line(self, text: str, kind: Kind = "plain") -> None:
        self.lines.append(text.strip())

    def looks(self, every: float = 1.0) -> Iterator[None]:
        """Yields every `every` seconds while the action runs, and once after it has ended."""
        while self.ended is None:
            yield
            threading.Event().wait(every)
        yield

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Work]:
        self.now = title
        yield self
        self.now = ""

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        self.now = f"{done} of {total} {text}" if total else text


class Works:
    """The actions started since the server began. They run one at a time."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._works: list[Work] = []

    def begin(
        self, title: str, by: str, call: Callable[..., Any], *arguments: Any, then: Callable[[], Any] = lambda: None
    ) -> Work:
        """Queues `call(*arguments, reporter=…)`; calls `then` when it has ended."""
        work = Work(title, by)
        self._works = [*self._works[-_KEPT:], work]
        threading.Thread(target=self._run, args=(work, call, arguments, then), daemon=True).start()
        return work

    def listed(self) -> list[Work]:
        """Returns all actions, latest first."""
        return self._works[::-1]

    def _run(self, work: Work, call: Callable[..., Any], arguments: tuple[Any, ...], then: Callable[[], Any]) -> None:
        with self._turn:
            work.now = "begins"
            apart = Apart()
            try:
                work.result = apart.call(call, *arguments, reporter=work)
            except LlmRayError as error:
                work.problem = str(error)
            finally:
                apart.close()
                with contextlib.suppress(LlmRayError):
                    then()
                work.ended = time.time()


def show_works(works: Sequence[Work]) -> str:
    """Returns the state of the latest actions as HTML."""
    found = []
    for work in works[:4]:
        lines = "\n".join(work.lines[-4:]) if work.ended is None or work.problem else ""
        text = "\n".join(filter(None, [f"{work.title} ({work.by}): {work.state}", lines, work.problem]))
        found.append(note(text, "bad" if work.problem else ""))
    return f'<div role="status">{"".join(found)}</div>'
