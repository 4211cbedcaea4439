"""API keys: a file of hashes, which the gateway reloads when it changes.

llm-ray serve keys add alice

A key is `llmray-ID-SECRET`. The public id finds its entry. The secret has 256 random bits, which cannot be guessed, so
a plain SHA-256 suffices; slow hashes are for passwords that people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from llm_ray.conf.serve import Limits
from llm_ray.errors import ConfError, ServeError
from llm_ray.private import PrivateFile, Watched

_LOG = logging.getLogger("ray.serve")
_PREFIX = "llmray"
_SECRET = re.compile(rf"{_PREFIX}-[0-9a-f]{{8}}-[\w-]{{43}}")
_NOBODY = "0" * 64  # a hash that no key has
_LONGEST_NAME = 64
Scope = Literal["ask", "train", "admin"]
"""What a key may do. `ask`: send requests to models. `train`: use files and jobs of the fine-tuning API. `admin`: both,
with priority for jobs and access to all models made by jobs."""
USUAL_SCOPES: tuple[Scope, ...] = ("ask", "train")


@dataclass(frozen=True)
class Key:
    """A stored key, with the hash of its secret."""

    id: str
    name: str
    sha256: str
    created: float
    """Seconds since 1970, like `expires`."""
    expires: float | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Models that it may use. None: all."""
    limits: Limits = field(default_factory=Limits)
    """Its own limits; unset ones come from the endpoint's conf."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = USUAL_SCOPES

    @property
    def expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


_KEYS = TypeAdapter(dict[str, Key])


def _file(path: Path) -> PrivateFile[Key]:
    return PrivateFile(path, _KEYS, "API keys", ServeError)


def keys_file(home: Path) -> Path:
    """Returns the path of the keys file; on a cluster it is on shared storage."""
    return home / "serve" / "keys.json"


class Keys:
    """The gateway's view of a keys file. If the file is unreadable or untrusted, no key is accepted, and the log says
    so once."""

    def __init__(self, path: Path) -> None:
        self._keys = Watched(
            _file(path), _LOG, "No API key is accepted", "llm-ray serve keys add NAME makes the first key"
        )

    def check(self, secret: str) -> Key | None:
        """Returns the key with this secret; None if it is unknown, revoked or expired."""
        key = self._keys.entries().get(_identity(secret))
        same = hmac.compare_digest(_hash(secret), key.sha256 if key else _NOBODY)
        return key if key and same and not key.expired else None


def add_key(
    path: Path,
    name: str,
    limits: Limits,
    models: tuple[str, ...] | None = None,
    expires: float | None = None,
    scopes: tuple[Scope, ...] = USUAL_SCOPES,
) -> tuple[Key, str]:
    """Creates a key; returns it and its secret, which is not stored. Raises ConfError for an invalid name, ServeError
    if the name is taken or the file cannot be used."""
    _check_name(name)
    with _file(path).writing() as keys:
        if name in keys or any(key.name == name and not key.expired for key in keys.values()):
            raise ServeError(
                f"a key called {name} already exists: choose another name, or revoke it first (llm-ray serve keys "
                f"revoke {name})"
            )
        taken = {*keys, *(key.name for key in keys.values())}
        secret = next(made for made in iter(new_secret, None) if _identity(made) not in taken)
        key = Key(_identity(secret), name, _hash(secret), time.time(), expires, models, limits, scopes)
        keys[key.id] = key
    return key, secret


def new_secret() -> str:
    """Returns a new secret, not stored yet."""
    return f"{_PREFIX}-{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}"


def import_keys(path: Path, wanted: Mapping[str, str]) -> list[str]:
    """Stores keys (secrets by name): adds new ones, and replaces the secret of a name if it differs. Other keys stay.
    Returns the changed names. Raises ConfError for an invalid name or a secret not made by `new_secret`, ServeError."""
    for name, secret in wanted.items():
        _check_name(name)
        if not isinstance(secret, str) or not _SECRET.fullmatch(secret):
            raise ConfError(
                f"the key called {name} was not created by llm-ray: create one with llm-ray serve keys generate"
            )
    if len({_identity(secret) for secret in wanted.values()}) < len(wanted):
        raise ConfError("two names have the same key: give each its own key")
    changed = []
    with _file(path).writing() as keys:
        for name, secret in wanted.items():
            here = next((key for key in keys.values() if key.name == name), None)
            if here and here.sha256 == _hash(secret) and not here.expired:
                continue
            if (other := keys.get(_identity(secret))) and other.name != name:
                raise ServeError(
                    f"the key called {name} already exists under the name {other.name}: revoke that one first"
                )
            if here:
                del keys[here.id]
            kept = replace(here, expires=None) if here else Key("", name, "", time.time())
            keys[_identity(secret)] = replace(kept, id=_identity(secret), sha256=_hash(secret))
            changed.append(name)
    return changed


def list_keys(path: Path) -> list[Key]:
    """Returns all keys, oldest first. Raises ServeError."""
    return sorted(_file(path).stored().values(), key=lambda key: key.created)


def revoke_key(path: Path, called: str) -> Key:
    """Deletes a key by its name or id, and returns it. Raises ServeError."""
    with _file(path).writing() as keys:
        return keys.pop(_found(keys, called).id)


def set_scopes(path: Path, called: str, scopes: tuple[Scope, ...]) -> Key:
    """Replaces the scopes of a key, by its name or id; returns the changed key. Raises ServeError."""
    with _file(path).writing() as keys:
        key = replace(_found(keys, called), scopes=scopes)
        keys[key.id] = key
    return key


def _found(keys: Mapping[str, Key], called: str) -> Key:
    found = [key for key in keys.values() if called in (key.id, key.name)]
    if not found:
        names = ", ".join(key.name for key in keys.values()) or "none"
        raise ServeError(f"no key called {called}; there are: {names}")
    if len(found) > 1:
        raise ServeError(
            f"{len(found)} keys are called {called}: choose one by its id ({', '.join(key.id for key in found)})"
        )
    return found[0]


def effective(key: Key | None, common: Limits) -> Limits:
    """Returns the key's limits, completed by the endpoint's."""
    if key is None:
        return common
    own = {name: value for name, value in key.limits.model_dump().items() if value is not None}
    return common.model_copy(update=own)


def _check_name(name: str) -> None:
    if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ConfError(f"{name!r} is not a valid key name: use 1 to {_LONGEST_NAME} printable characters")


def _identity(secret: str) -> str:
    return secret.removeprefix(f"{_PREFIX}-").partition("-")[0]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
