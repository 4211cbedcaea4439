"""Signed-in users and failed sign-in attempts, kept in memory: after a restart everybody must sign in again."""

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
"""Seconds after which a session without an open page ends."""
ABSOLUTE = 12 * 3600.0
"""Seconds after which any session ends."""
_MOST_SESSIONS = 10_000


@dataclass(frozen=True)
class Visitor:
    """The caller as the server knows it; nothing here comes from the client."""

    name: str
    role: Role


@dataclass(eq=False)
class Session:
    """The session of one signed-in browser."""

    id: str
    visitor: Visitor
    stamp: str
    began: float
    seen: float
    csrf: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    """Requests in progress; an open page always has one."""


class Sessions:
    """The sessions of the UI, by random id."""

    def __init__(self, users: Users, clock: Callable[[], float] = time.monotonic) -> None:
        self._users, self._clock = users, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._pages: OrderedDict[str, Session] = OrderedDict()

    def begin(self, name: str, role: Role, stamp: str) -> Session:
        """Creates a session for a user who has just authenticated."""
        now = self._clock()
        session = Session(secrets.token_urlsafe(32), Visitor(name, role), stamp, now, now, secrets.token_urlsafe(32))
        self._sessions[session.id] = session
        while len(self._sessions) > _MOST_SESSIONS:
            self.end(next(iter(self._sessions.values())))
        return session

    def find(self, id: str) -> Session | None:
        """Returns the session with this id; None if it has expired or its user was changed or revoked."""
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
        """Counts a request of the session while it is answered."""
        session.requests += 1
        try:
            yield
        finally:
            session.requests -= 1
            session.seen = self._clock()

    def sweep(self) -> None:
        """Ends expired sessions; their open streams notice through `ended`."""
        for session in list(self._sessions.values()):
            self._holds(session)

    def claim(self, page: str, session: Session) -> bool:
        """Returns whether an open page (Gradio's session_hash, chosen by the browser) belongs to this session; the
        first session to claim it owns it."""
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
            return not self._users.any()  # adding the first user closes this way in
        user = self._users.find(session.visitor.name)
        return user is not None and user.stamp == session.stamp


class Lockout:
    """Counts failed passwords by name and by client; beyond a limit each further failure doubles the waiting time.

    Unknown names are locked like existing ones. An attempt counts before it is checked, so parallel attempts do not
    bypass the limit.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # failures, locked until

    def attempt(self, name: str, client: str) -> int:
        """Returns the seconds to wait before the next attempt; 0 permits this attempt and counts it."""
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
        """Resets the name after a correct password; the client's other failures still count."""
        by_name, by_client = self._keys(name, client)
        self._failures.pop(by_name, None)
        if found := self._failures.get(by_client):
            self._failures[by_client] = found[0] - 1, 0.0

    @staticmethod
    def _keys(name: str, client: str) -> dict[str, int]:
        return {f"name {name}": _FREE_BY_NAME, f"client {client}": _FREE_BY_CLIENT}


_FREE_BY_NAME, _FREE_BY_CLIENT = 5, 20  # attempts without delay; several people may share an address
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 900.0  # seconds
_MOST_COUNTED = 100_000
