"""Scopes of a request's key."""

from __future__ import annotations

from starlette.requests import Request

from llm_ray.serve.gateway.errors import ApiError
from llm_ray.serve.gateway.protect.keys import Key, Scope

_FOR = {"ask": "ask models", "train": "train", "admin": "do this"}


def key_of(request: Request) -> Key | None:
    """Returns the request's key; None if the endpoint requires none."""
    key: Key | None = request.scope.get("state", {}).get("llm_ray_key")
    return key


def is_admin(key: Key | None) -> bool:
    """Whether the key is an admin's. Without keys nobody is: all clients have the same rights."""
    return key is not None and key.may("admin")


def check_scope(request: Request, scope: Scope) -> None:
    """Raises ApiError if the request's key lacks the scope."""
    key = key_of(request)
    if key and not key.may(scope):
        raise ApiError(
            403,
            f"This API key may not {_FOR[scope]}: its scopes are {', '.join(key.scopes)}. On the endpoint's machine: "
            f"llm-ray serve keys scopes {key.id} {' '.join((*key.scopes, scope))}",
            "insufficient_scope",
        )
