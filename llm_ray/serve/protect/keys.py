"""API keys: a file of hashes, which the gateway reads anew whenever it has changed.

llm-ray serve keys add alice

A key is `llmray-ID-SECRET`: the public id finds its entry, the secret has 256 random bits. So much cannot be guessed, and a plain SHA-256
of it is as good as a slow hash, which is for what people think up.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from llm_ray.conf.schema import home
from llm_ray.conf.serve import Limits
from llm_ray.errors import ConfError, ServeError
from llm_ray.files import locked, write_text

_LOG = logging.getLogger("ray.serve")
_PREFIX = "llmray"
_SECRET = re.compile(rf"{_PREFIX}-[0-9a-f]{{8}}-[\w-]{{43}}")
_NOBODY = "0" * 64  # a hash that no key has
_LONGEST_NAME = 64
_OPEN_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Key:
    """A key as it is kept: no secret, its hash."""

    id: str
    name: str
    sha256: str
    created: float
    """Seconds since 1970, as `expires`."""
    expires: float | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Those it may ask. None: all."""
    limits: Limits = field(default_factory=Limits)
    """Its own; what is unset there the endpoint's conf decides."""

    @property
    def expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires


_KEYS = TypeAdapter(dict[str, Key])


def keys_file() -> Path:
    """Where the keys are kept: on a cluster, on shared storage."""
    return home() / "serve" / "keys.json"


class Keys:
    """The keys of a file, as the gateway asks for them. A file that cannot be read, or trusted, opens nothing; the log says so once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._opened = -_OPEN_EVERY
        self._keys: dict[str, Key] = {}
        self._complaint = ""

    def check(self, secret: str) -> Key | None:
        """The key whose secret this is, unless it is unknown, revoked or expired."""
        self._refresh()
        key = self._keys.get(_identity(secret))
        same = hmac.compare_digest(_hash(secret), key.sha256 if key else _NOBODY)
        return key if key and same and not key.expired else None

    def _refresh(self) -> None:
        complaint = ""
        try:
            if (now := time.monotonic()) - self._opened >= _OPEN_EVERY:
                os.close(os.open(self._path, os.O_RDONLY))  # has NFS ask its server; a stat alone it answers from what it knew a minute ago
                self._opened = now
            found = self._path.stat()
            seen = (found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size)  # ctime: permissions change it, too
            if seen == self._seen:
                return
            try:
                self._keys, self._seen = _read(self._path), seen
            except ServeError as error:  # it is so until the file changes
                self._keys, self._seen, complaint = {}, seen, str(error)
        except FileNotFoundError:
            self._keys, self._seen, complaint = {}, None, f"{self._path} is not there: llm-ray serve keys add NAME makes the first key"
        except OSError as error:
            self._keys, self._seen, complaint = {}, None, f"{self._path} cannot be read: {error.strerror or error}"
        if complaint and complaint != self._complaint:
            _LOG.error(f"No API key is accepted: {complaint}")
        self._complaint = complaint


def add_key(path: Path, name: str, limits: Limits, models: tuple[str, ...] | None = None, expires: float | None = None) -> tuple[Key, str]:
    """A new key, and its secret, which is kept nowhere. Raises ConfError for a name that is none, ServeError."""
    _check_name(name)
    with _writing(path) as keys:
        if name in keys or any(key.name == name and not key.expired for key in keys.values()):
            raise ServeError(
                f"there is a key called {name} already: choose another name, or revoke it first (llm-ray serve keys revoke {name})"
            )
        taken = {*keys, *(key.name for key in keys.values())}
        secret = next(made for made in iter(new_secret, None) if _identity(made) not in taken)
        key = Key(_identity(secret), name, _hash(secret), time.time(), expires, models, limits)
        keys[key.id] = key
    return key, secret


def new_secret() -> str:
    """A key that is kept nowhere yet."""
    return f"{_PREFIX}-{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}"


def import_keys(path: Path, wanted: Mapping[str, str]) -> list[str]:
    """Keep these keys (secrets by name): new ones are added, one whose secret is another takes the place of the old. The names of those
    that were changed. Others stay. Raises ConfError for what is no name or no key of `new_secret`, ServeError."""
    for name, secret in wanted.items():
        _check_name(name)
        if not isinstance(secret, str) or not _SECRET.fullmatch(secret):
            raise ConfError(f"the key called {name} is none that llm-ray made: llm-ray serve keys generate prints one")
    if len({_identity(secret) for secret in wanted.values()}) < len(wanted):
        raise ConfError("two names have the same key: give each a key of its own")
    changed = []
    with _writing(path) as keys:
        for name, secret in wanted.items():
            here = next((key for key in keys.values() if key.name == name), None)
            if here and here.sha256 == _hash(secret) and not here.expired:
                continue
            if (other := keys.get(_identity(secret))) and other.name != name:
                raise ServeError(f"the key called {name} is already there under the name {other.name}: revoke that one first")
            if here:
                del keys[here.id]
            kept = replace(here, expires=None) if here else Key("", name, "", time.time())
            keys[_identity(secret)] = replace(kept, id=_identity(secret), sha256=_hash(secret))
            changed.append(name)
    return changed


def list_keys(path: Path) -> list[Key]:
    """All keys, the oldest first. Raises ServeError."""
    return sorted(_stored(path).values(), key=lambda key: key.created)


def revoke_key(path: Path, called: str) -> Key:
    """Take a key away, by its name or id. Raises ServeError."""
    with _writing(path) as keys:
        found = [key for key in keys.values() if called in (key.id, key.name)]
        if not found:
            there = ", ".join(key.name for key in keys.values()) or "none"
            raise ServeError(f"there is no key called {called}; there are: {there}")
        if len(found) > 1:
            raise ServeError(f"{len(found)} keys are called {called}: name one by its id ({', '.join(key.id for key in found)})")
        return keys.pop(found[0].id)


def effective(key: Key | None, common: Limits) -> Limits:
    """The key's limits, and the endpoint's where it has none of its own."""
    if key is None:
        return common
    own = {name: value for name, value in key.limits.model_dump().items() if value is not None}
    return common.model_copy(update=own)


def _check_name(name: str) -> None:
    if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ConfError(f"{name!r} cannot be a key's name: 1 to {_LONGEST_NAME} printable characters")


def _identity(secret: str) -> str:
    return secret.removeprefix(f"{_PREFIX}-").partition("-")[0]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _read(path: Path) -> dict[str, Key]:
    """Raises ServeError where others can read the file or exchange it, or it holds no keys; OSError."""
    folder = path.parent.stat().st_mode
    if folder & (stat.S_IWGRP | stat.S_IWOTH) and not folder & stat.S_ISVTX:
        raise ServeError(f"others can exchange files in {path.parent} (mode {folder & 0o777:o}): chmod 700 {path.parent}")
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ServeError(f"{path} is open to others (mode {mode & 0o777:o}): chmod 600 {path}")
        text = file.read()
    try:
        return _KEYS.validate_json(text)
    except ValidationError as error:
        raise ServeError(f"{path} holds no API keys: {error.errors()[0]['msg']}. Restore it, or remove it and make new keys") from error


def _stored(path: Path) -> dict[str, Key]:
    """The keys to be shown or changed; a file that is not there yet holds none. Raises ServeError."""
    try:
        return _read(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ServeError(f"{path} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[dict[str, Key]]:
    """The keys, to be changed and written by one process at a time, whole or not at all. Raises ServeError."""
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = path.parent.stat()
        owner = (folder.st_uid, folder.st_gid) if os.geteuid() == 0 else None  # who serves is the folder's owner
        with locked(lock):
            if owner:
                os.chown(lock, *owner)
            keys = _stored(path)
            yield keys
            write_text(path, _KEYS.dump_json(keys, indent=2).decode() + "\n", mode=0o600, owner=owner)
    except OSError as error:
        raise ServeError(f"{path} cannot be written: {error.strerror or error}") from error
