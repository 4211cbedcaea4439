"""API keys: a file of hashes, which the gateway reads anew whenever it has changed.

llm-ray serve keys add alice

A key is `llmray-ID-SECRET`: the public id finds its entry, the secret has 256 random bits. So much cannot be guessed, and a plain SHA-256
of it is as good as a slow hash, which is for what people think up.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llm_ray.conf.schema import home
from llm_ray.conf.serve import Limits
from llm_ray.errors import ServeError
from llm_ray.files import locked, write_text

_LOG = logging.getLogger("ray.serve")
_PREFIX = "llmray"
_OTHERS = 0o077  # permissions of others than the owner


@dataclass(frozen=True)
class Key:
    """A key as it is kept: no secret, its hash."""

    id: str
    name: str
    sha256: str
    created: float
    """Seconds since 1970, as `expires`."""
    expires: float | None = None
    models: tuple[str, ...] | None = None
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
    """The keys of a file, as the gateway asks for them. A file that cannot be read opens nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}

    def check(self, secret: str) -> Key | None:
        """The key whose secret this is, unless it is unknown, revoked or expired."""
        self._refresh()
        prefix, _, rest = secret.partition("-")
        identity = rest.partition("-")[0]
        key = self._keys.get(identity)
        known = key.sha256 if key else "0" * 64
        same = hmac.compare_digest(_hash(secret), known)
        return key if key and same and prefix == _PREFIX and not key.expired else None

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen == self._seen:
                return
            self._keys = _read(self._path)
        except (OSError, ServeError) as error:
            if self._seen is not None or self._keys:
                _LOG.error(f"no API key is accepted: {error}")
            self._keys, self._seen = {}, None
            return
        self._seen = seen


def add_key(path: Path, name: str, limits: Limits, models: tuple[str, ...] | None = None, expires: float | None = None) -> tuple[Key, str]:
    """A new key, and its secret, which is kept nowhere. Raises ServeError."""
    with _writing(path) as keys:
        if any(key.name == name and not key.expired for key in keys.values()):
            raise ServeError(
                f"there is a key called {name} already: choose another name, or revoke it first (llm-ray serve keys revoke {name})"
            )
        identity = secrets.token_hex(4)
        while identity in keys:
            identity = secrets.token_hex(4)
        secret = f"{_PREFIX}-{identity}-{secrets.token_urlsafe(32)}"
        key = Key(identity, name, _hash(secret), time.time(), expires, models, limits)
        keys[identity] = key
    return key, secret


def list_keys(path: Path) -> list[Key]:
    """All keys, the oldest first. Raises ServeError."""
    return sorted(_read(path).values(), key=lambda key: key.created) if path.exists() else []


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


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _read(path: Path) -> dict[str, Key]:
    mode = path.stat().st_mode
    if mode & _OTHERS:
        raise ServeError(f"{path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}")
    try:
        return _KEYS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ServeError(f"{path} holds no API keys: {error.errors()[0]['msg']}. Restore it, or remove it and make new keys") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[dict[str, Key]]:
    """The keys, to be changed and written by one process at a time, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with locked(path.with_suffix(".lock")):
            keys = _read(path) if path.exists() else {}
            yield keys
            text = json.dumps(
                {i: asdict(replace(key, limits=Limits())) | {"limits": key.limits.model_dump()} for i, key in keys.items()}, indent=2
            )
            write_text(path, text + "\n", mode=0o600)
            if os.geteuid() == 0:  # who serves is the folder's owner
                os.chown(path, path.parent.stat().st_uid, path.parent.stat().st_gid)
    except OSError as error:
        raise ServeError(f"{path} cannot be written: {error.strerror or error}") from error
