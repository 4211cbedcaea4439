"""Process-wide resources shared by threads: the connection to Ray, a logging switch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """A resource that is opened for the first thread that uses it and closed after the last, so that no thread restores
    state that others still need.

    Threads that use another `key` wait until it is closed. Within one thread that would deadlock, so a nested use with
    another key opens its resource at once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users: list[tuple[int, object]] = []  # thread id, unique mark (another thread may close a generator)
        self._key: Hashable = None
        self._opened = ExitStack()

    @contextlib.contextmanager
    def use(self, key: Hashable, opening: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """Yields the value of `opening`, or the one that another thread opened with the same `key`."""
        user = (threading.get_ident(), object())
        with self._changed:
            self._changed.wait_for(lambda: not self._users or self._key == key or self._nested())
            nested = bool(self._users) and self._key != key
            if not self._users:
                with ExitStack() as stack:
                    self._value = stack.enter_context(opening())
                    self._opened = stack.pop_all()
                self._key = key
            if not nested:
                self._users.append(user)
        if nested:
            with opening() as value:
                yield value
            return
        try:
            yield self._value
        finally:
            with self._changed:
                self._users.remove(user)
                if not self._users:
                    try:
                        self._opened.close()
                    finally:
                        self._changed.notify_all()

    def _nested(self) -> bool:
        return any(thread == threading.get_ident() for thread, _ in self._users)
