"""Sessions end by age, and with what their user was; wrong passwords make everybody wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ray.ui.sessions import ABSOLUTE, IDLE, Lockout, Session, Sessions
from llm_ray.ui.users import LOCAL, Role, User, Users, add_user, change_user, revoke_user


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ui" / "users.json"


@pytest.fixture
def alice(file: Path) -> User:
    return add_user(file, "alice", "several words together", Role.USER)


@pytest.fixture
def sessions(file: Path, clock: Clock) -> Sessions:
    return Sessions(Users(file), clock)


def _begun(sessions: Sessions, user: User) -> Session:
    return sessions.begin(user.name, user.role, user.stamp)


def test_a_session_is_found_by_its_id_alone(sessions: Sessions, alice: User) -> None:
    first, second = _begun(sessions, alice), _begun(sessions, alice)
    assert first.id != second.id and len(first.id) >= 43
    assert sessions.find(first.id) is first and sessions.find(second.id) is second
    assert sessions.find("") is None and sessions.find(first.id[:-1]) is None
    sessions.end(first)
    assert sessions.find(first.id) is None and sessions.find(second.id) is second


def test_it_ends_when_no_page_is_open_for_long(sessions: Sessions, alice: User, clock: Clock) -> None:
    session = _begun(sessions, alice)
    with sessions.request(session):
        clock.now += IDLE + 1
        assert sessions.find(session.id)  # a page is open
    clock.now += IDLE - 1
    assert sessions.find(session.id)
    clock.now += 2
    assert sessions.find(session.id) is None
    assert session.ended.is_set()


def test_it_ends_by_its_age_however_it_is_used(sessions: Sessions, alice: User, clock: Clock) -> None:
    session = _begun(sessions, alice)
    with sessions.request(session):
        clock.now += ABSOLUTE + 1
        sessions.sweep()
    assert session.ended.is_set() and sessions.find(session.id) is None


@pytest.mark.parametrize("change", ["role", "password", "revoke", "again"])
def test_a_change_of_the_user_ends_open_sessions_at_once(
    sessions: Sessions, alice: User, file: Path, change: str
) -> None:
    session = _begun(sessions, alice)
    match change:
        case "role":
            change_user(file, "alice", role=Role.ADMIN)
        case "password":
            change_user(file, "alice", password="another one of words")
        case "revoke":
            revoke_user(file, "alice")
        case "again":
            revoke_user(file, "alice")
            add_user(file, "alice", "several words together", Role.USER)
    sessions.sweep()
    assert session.ended.is_set() and sessions.find(session.id) is None


def test_the_first_user_ends_the_way_in_without_users(sessions: Sessions, file: Path) -> None:
    session = sessions.begin(LOCAL, Role.ADMIN, "")
    assert sessions.find(session.id)
    add_user(file, "alice", "several words together", Role.USER)
    assert sessions.find(session.id) is None


def test_a_page_belongs_to_who_opened_it(sessions: Sessions, alice: User, file: Path) -> None:
    bob = add_user(file, "bob", "several words together", Role.ADMIN)
    hers, his, again = _begun(sessions, alice), _begun(sessions, bob), _begun(sessions, alice)
    assert sessions.claim("page", hers) and sessions.claim("page", hers)
    assert not sessions.claim("page", his) and not sessions.claim("page", again)
    sessions.end(hers)
    assert not sessions.claim("page", his)
    assert sessions.claim("page", again)  # she has signed in again, and the page is still open


def _waits(lockout: Lockout, times: int, name: str = "alice", client: str = "a") -> list[int]:
    return [lockout.attempt(name, client) for _ in range(times)]


def test_after_some_wrong_passwords_a_name_waits_longer_each_time(clock: Clock) -> None:
    lockout = Lockout(clock)
    assert _waits(lockout, 5) == [0] * 5
    waits = []
    for _ in range(8):
        waits.append(lockout.attempt("alice", "elsewhere"))
        clock.now += waits[-1]
        assert lockout.attempt("alice", "elsewhere") == 0
    assert waits == [30, 60, 120, 240, 480, 900, 900, 900]
    assert lockout.attempt("bob", "elsewhere") == 0


def test_a_name_that_nobody_has_waits_too(clock: Clock) -> None:
    assert _waits(Lockout(clock), 6, name="nobody") == [0, 0, 0, 0, 0, 30]


def test_a_client_that_tries_many_names_waits(clock: Clock) -> None:
    lockout = Lockout(clock)
    assert [lockout.attempt(f"name{n}", "a") for n in range(21)] == [0] * 20 + [30]
    assert lockout.attempt("name30", "b") == 0


def test_the_right_password_frees_the_name_and_not_the_client(clock: Clock) -> None:
    lockout = Lockout(clock)
    for _ in range(6):
        assert _waits(lockout, 3) == [0, 0, 0]
        lockout.succeeded("alice", "a")
    assert _waits(lockout, 9, name="bob")[:5] == [0] * 5  # 12 of hers count against the address, and these 5
    assert [lockout.attempt(f"name{n}", "a") for n in range(4)] == [0, 0, 0, 30]
