"""Users of the UI: a file of names, roles and slow password hashes.

llm-ray ui users add alice --role admin
"""

from __future__ import annotations

import enum
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import argon2
from pydantic import TypeAdapter

from llm_ray.errors import ConfError, LlmRayError
from llm_ray.private import PrivateFile, Watched

_LOG = logging.getLogger("llm_ray.ui")
# Names are also folder names: they must be unique on case-insensitive file systems, not hidden, and no path escapes.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}(\.[a-z0-9_-]{1,31})?")
_SHORTEST, _LONGEST = 12, 1024  # characters of a password
_HASHER = argon2.PasswordHasher()  # second recommended option of RFC 9106: 64 MiB, about 100 ms
_NOBODY = _HASHER.hash(secrets.token_urlsafe())
LOCAL = "local"
"""Name of the visitor who used the printed sign-in link while there were no users."""


class Role(enum.StrEnum):
    """Permissions; each role includes those before it."""

    VIEWER = "viewer"
    USER = "user"
    ADMIN = "admin"

    def covers(self, least: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(least)


@dataclass(frozen=True)
class User:
    """A stored user, with a password hash."""

    name: str
    role: Role
    hash: str
    stamp: str
    """Changes with every update, which ends older sessions."""
    created: float
    """Seconds since 1970."""


class UserError(LlmRayError):
    """The users' file cannot be used, or the named user does not exist."""


_USERS = TypeAdapter(dict[str, User])


def users_file(home: Path) -> Path:
    """Returns the path of the users' file."""
    return home / "ui" / "users.json"


class Users:
    """A running server's view of the users' file; changes apply from the next request on."""

    def __init__(self, path: Path) -> None:
        self._users = Watched(_file(path), _LOG, "Nobody can sign in")

    def find(self, name: str) -> User | None:
        return self._users.entries().get(name)

    def any(self) -> bool:
        return bool(self._users.entries())

    def check(self, name: str, password: str) -> User | None:
        """Returns the user if the password is correct, else None. An unknown name takes as long: one hash, 64 MiB."""
        user = self.find(name)
        return user if _is_password(password[:_LONGEST], user.hash if user else _NOBODY) else None


def add_user(path: Path, name: str, password: str, role: Role) -> User:
    """Adds a user. Raises ConfError for an invalid name or password, UserError."""
    _check_name(name)
    check_password(password)
    with _file(path).writing() as users:
        if name in users:
            raise UserError(f"a user called {name} already exists: change it with llm-ray ui users role or password")
        users[name] = User(name, role, _HASHER.hash(password), _stamp(), time.time())
        return users[name]


def change_user(path: Path, name: str, role: Role | None = None, password: str | None = None) -> User:
    """Changes a user's role or password and ends their sessions. Raises ConfError for an invalid password,
    UserError."""
    if password is not None:
        check_password(password)
    with _file(path).writing() as users:
        user = _known(users, name)
        changed = replace(
            user,
            role=role or user.role,
            stamp=_stamp(),
            hash=_HASHER.hash(password) if password is not None else user.hash,
        )
        users[name] = changed
        return changed


def import_users(path: Path, wanted: Mapping[str, tuple[str, Role]]) -> list[str]:
    """Adds or updates these users (password and role by name) and ends the sessions of updated ones; other users stay.
    Returns the names of added and updated users. Raises ConfError for an invalid name or password, UserError."""
    for name, (password, _) in wanted.items():
        _check_name(name)
        try:
            check_password(password)
        except ConfError as error:
            raise ConfError(f"the user {name}: {error}") from error
    changed = []
    with _file(path).writing() as users:
        for name, (password, role) in wanted.items():
            here = users.get(name)
            same = here is not None and _is_password(password, here.hash)
            if here and same and here.role is role:
                continue
            users[name] = User(
                name,
                role,
                here.hash if here and same else _HASHER.hash(password),
                _stamp(),
                here.created if here else time.time(),
            )
            changed.append(name)
    return changed


def revoke_user(path: Path, name: str) -> User:
    """Deletes a user and ends their sessions. Raises UserError."""
    with _file(path).writing() as users:
        _known(users, name)
        return users.pop(name)


def list_users(path: Path) -> list[User]:
    """Returns all users, oldest first; empty if there is no file. Raises UserError."""
    return sorted(_file(path).stored().values(), key=lambda user: user.created)


def check_password(password: str) -> None:
    """Raises ConfError if the password is too short or too long."""
    if not _SHORTEST <= len(password) <= _LONGEST:
        raise ConfError(f"a password has {_SHORTEST} to {_LONGEST} characters: several words are easy to remember")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name == LOCAL:
        raise ConfError(
            f"{name!r} is not a valid user name: use at most 32 lower-case letters, digits, - and _, with at most "
            f"one dot inside, and not {LOCAL!r}"
        )


def _is_password(password: str, hash: str) -> bool:
    try:
        return _HASHER.verify(hash, password)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False


def _file(path: Path) -> PrivateFile[User]:
    return PrivateFile(path, _USERS, "users", UserError)


def _known(users: dict[str, User], name: str) -> User:
    if name not in users:
        raise UserError(f"no user called {name}; there are: {', '.join(users) or 'none'}")
    return users[name]


def _stamp() -> str:
    return secrets.token_hex(8)
