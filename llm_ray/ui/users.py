"""Users of the page: a file of names, roles and slow password hashes.

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
# A name is a folder's name, too: on no file system the same as another, hidden, or a way out.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}(\.[a-z0-9_-]{1,31})?")
_SHORTEST, _LONGEST = 12, 1024  # characters of a password
_HASHER = argon2.PasswordHasher()  # RFC 9106's second choice: 64 MiB for some 100 ms
_NOBODY = _HASHER.hash(secrets.token_urlsafe())
LOCAL = "local"
"""Who came by the link that is printed where there are no users."""


class Role(enum.StrEnum):
    """What somebody may do; each role may do all that those before it may."""

    VIEWER = "viewer"
    USER = "user"
    ADMIN = "admin"

    def covers(self, least: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(least)


@dataclass(frozen=True)
class User:
    """A user as they are kept: no password, its hash."""

    name: str
    role: Role
    hash: str
    stamp: str
    """Another after every change: a session of an older one has ended."""
    created: float
    """Seconds since 1970."""


class UserError(LlmRayError):
    """The users' file cannot be used, or does not hold who was named."""


_USERS = TypeAdapter(dict[str, User])


def users_file(home: Path) -> Path:
    """Where the users are kept."""
    return home / "ui" / "users.json"


class Users:
    """The users of a file, as a running page asks for them: a change holds from the next request on."""

    def __init__(self, path: Path) -> None:
        self._users = Watched(_file(path), _LOG, "Nobody can sign in")

    def find(self, name: str) -> User | None:
        return self._users.entries().get(name)

    def any(self) -> bool:
        return bool(self._users.entries())

    def check(self, name: str, password: str) -> User | None:
        """The user whose password this is. It takes as long for a name that nobody has, and 64 MiB."""
        user = self.find(name)
        return user if _is_password(password[:_LONGEST], user.hash if user else _NOBODY) else None


def add_user(path: Path, name: str, password: str, role: Role) -> User:
    """A new user. Raises ConfError for a name or password that is none, UserError."""
    _check_name(name)
    check_password(password)
    with _file(path).writing() as users:
        if name in users:
            raise UserError(f"a user called {name} already exists: change it with llm-ray ui users role or password")
        users[name] = User(name, role, _HASHER.hash(password), _stamp(), time.time())
        return users[name]


def change_user(path: Path, name: str, role: Role | None = None, password: str | None = None) -> User:
    """Give a user another role or password; their sessions end. Raises ConfError for a password that is none,
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
    """Keep these users (password and role by name): new ones are added, one with another password or role is changed,
    and their sessions end. The names of those that were changed; all others stay. Raises ConfError for a name or
    password that is none, UserError."""
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
    """Take a user away; their sessions end. Raises UserError."""
    with _file(path).writing() as users:
        _known(users, name)
        return users.pop(name)


def list_users(path: Path) -> list[User]:
    """All users, the oldest first; none where there is no file. Raises UserError."""
    return sorted(_file(path).stored().values(), key=lambda user: user.created)


def check_password(password: str) -> None:
    """Raises ConfError for one that is too short or too long."""
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
