"""Signed-in users, and failed sign-in attempts. Kept in the memory of one process: after a restart of the page,
everybody has to sign in again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llm_ray.ui.users import LOCAL, Role, Users

IDLE = 2 * 3600.0
"""Seconds after which a session ends of which no page is open."""
ABSOLUTE = 12 * 3600.0
"""Seconds after which any session ends."""
_MOST_SESSIONS = 10_000


@dataclass(frozen=True)
class Visitor:
    """Who makes a call, as the page knows it; nothing of it comes from the client."""

    name: str
    role: Role


@dataclass(eq=False)
class Session:
    """Of one browser that has signed in."""

    id: str
    visitor: Visitor
    stamp: str
    began: float
    seen: float
    csrf: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    """Being answered: an open page always has one."""


class Sessions:
    """The sessions of a page, by random ids."""

    def __init__(self, users: Users, clock: Callable[[], float] = time.monotonic) -> None:
        self._users, self._clock = users, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._pages: OrderedDict[str, Session] = OrderedDict()

    def begin(self, name: str, role: Role, stamp: str) -> Session:
        """Of somebody who has just proved who they are."""
        now = self._clock()
        session = Session(secrets.token_urlsafe(32), Visitor(name, role), stamp, now, now, secrets.token_urlsafe(32))
        self._sessions[session.id] = session
        while len(self._sessions) > _MOST_SESSIONS:
            self.end(next(iter(self._sessions.values())))
        return session

    def find(self, id: str) -> Session | None:
        """The session with this id, unless it has ended: by its age, or since the user was changed or revoked."""
        session = self._sessions.get(id)
        if session is None or not self._holds(session):
            return None
        return session

    def end(self, session: Session) -> None:
        self._sessions.pop(session.id, None)
        session.ended.set()

    def end_all(self) -> None:
        for session in list(self._sessions.values()):
            self.end(session)

    @contextlib.contextmanager
    def request(self, session: Session) -> Iterator[None]:
        """A request of the session, as long as it is answered."""
        session.requests += 1
        try:
            yield
        finally:
            session.requests -= 1
            session.seen = self._clock()

    def sweep(self) -> None:
        """End what has to end: open streams of it hear of it by `ended`."""
        for session in list(self._sessions.values()):
            self._holds(session)

    def claim(self, page: str, session: Session) -> bool:
        """Whether an open page (Gradio's session_hash, which the browser chose) is this session's; the first to name it
        has it."""
        owner = self._pages.setdefault(page, session)
        if owner is not session and owner.ended.is_set() and owner.visitor == session.visitor:
            owner = self._pages[page] = session  # the same person has signed in again
        self._pages.move_to_end(page)
        while len(self._pages) > 10 * _MOST_SESSIONS:
            self._pages.popitem(last=False)
        return owner is session

    def _holds(self, session: Session) -> bool:
        now = self._clock()
        idle = session.requests == 0 and now - session.seen > IDLE
        if session.ended.is_set() or idle or now - session.began > ABSOLUTE or not self._is_current(session):
            self.end(session)
            return False
        return True

    def _is_current(self, session: Session) -> bool:
        if session.visitor.name == LOCAL:
            return not self._users.any()  # the first user has closed that door
        user = self._users.find(session.visitor.name)
        return user is not None and user.stamp == session.stamp


class Lockout:
    """Wrong passwords, counted by name and by client: after some, waiting times that double.

    A name that nobody has is locked like one of a user, and an attempt counts before it is checked: many at once are no
    way around.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, until when

    def attempt(self, name: str, client: str) -> int:
        """Seconds to wait before the next attempt; 0: this one counts, and may be made."""
        keys = self._keys(name, client)
        wait = max(self._failures.get(key, (0, 0.0))[1] for key in keys) - self._clock()
        if wait > 0:
            return math.ceil(wait)
        for key, free in keys.items():
            failures = self._failures.get(key, (0, 0.0))[0] + 1
            pause = min(_FIRST_PAUSE * 2 ** (failures - free), _LONGEST_PAUSE) if failures >= free else 0.0
            self._failures[key] = failures, self._clock() + pause if pause else 0.0
            self._failures.move_to_end(key)
        while len(self._failures) > _MOST_COUNTED:
            self._failures.popitem(last=False)
        return 0

    def succeeded(self, name: str, client: str) -> None:
        """The attempt's password was right: the name is free again. What else its client tried still counts."""
        by_name, by_client = self._keys(name, client)
        self._failures.pop(by_name, None)
        if found := self._failures.get(by_client):
            self._failures[by_client] = found[0] - 1, 0.0

    @staticmethod
    def _keys(name: str, client: str) -> dict[str, int]:
        return {f"name {name}": _FREE_BY_NAME, f"client {client}": _FREE_BY_CLIENT}


_FREE_BY_NAME, _FREE_BY_CLIENT = 5, 20  # attempts; several people may share an address
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 900.0  # seconds
_MOST_COUNTED = 100_000
