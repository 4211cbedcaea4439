"""What stands before the API: size and slowness of bodies, keys, limits, time-outs, clients that are gone. Plain ASGI, for streams.

Specification: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_ray.conf.serve import Limits
from llm_ray.serve.protect.errors import error_body, openai_error
from llm_ray.serve.protect.keys import Key, Keys, effective
from llm_ray.serve.protect.limits import Limiter

# Asked by load balancers and service managers, which have no key.
OPEN = frozenset({"/health", "/ready"})
_CLOSING = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Body:
    """Reads the body before the app does: within `seconds`, and `most` bytes at most."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        body = bytearray()
        too_large = declared.isdecimal() and int(declared) > self._most
        try:
            async with asyncio.timeout(self._seconds):
                more = not too_large
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    too_large = len(body) > self._most
                    more = message.get("more_body", False) and not too_large
        except TimeoutError:
            answer = openai_error(408, f"The request's body did not arrive within {self._seconds:g} s.", "body_timeout")
            await answer(scope, receive, send)
            return
        if too_large:
            answer = openai_error(
                413, f"The request's body is larger than {self._most:,} bytes.", "body_too_large", headers={"Connection": "close"}
            )
            await answer(scope, receive, send)
            return
        rest: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, again, send)


class Access:
    """Lets in who has a key, within the key's limits. `keys` None: everybody, within the common limits."""

    def __init__(self, app: ASGIApp, keys: Keys | None, common: Limits, limiter: Limiter) -> None:
        self._app, self._keys, self._common, self._limiter = app, keys, common, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        key: Key | None = None
        if self._keys is not None:
            secret = _secret(Headers(scope=scope))
            key = self._keys.check(secret) if secret else None
            if key is None:
                said = "This API key is not valid." if secret else "An API key is needed: Authorization: Bearer KEY"
                answer = openai_error(401, said, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await answer(scope, receive, send)
                return
        limits = effective(key, self._common)
        state = scope.setdefault("state", {})
        state["llm_ray_key"] = key
        state["llm_ray_max_tokens"] = limits.max_tokens
        if scope["method"] != "POST":  # to look costs nothing
            await self._app(scope, receive, send)
            return
        who = key.id if key else ""
        if refused := self._limiter.take(who, limits):
            answer = openai_error(429, refused.message, "rate_limit_exceeded", headers={"Retry-After": str(refused.retry_after)})
            await answer(scope, receive, send)
            return
        left = self._limiter.headers(who, limits)
        try:
            await self._app(scope, receive, _with_headers(send, left))
        finally:
            self._limiter.release(who)


class Deadline:
    """Ends a request that takes longer than `seconds`, or whose client is gone: the app's work is cancelled, and so the engine's."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = False
        streams = False
        gone = asyncio.Event()
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def listen() -> None:
            while True:
                message = await receive()
                await messages.put(message)
                if message["type"] == "http.disconnect":
                    gone.set()
                    return

        async def told(message: Message) -> None:
            nonlocal began, streams
            if message["type"] == "http.response.start":
                began = True
                streams = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            await send(message)

        listener = asyncio.create_task(listen())
        work = asyncio.create_task(_awaited(self._app(scope, messages.get, told)))
        waiting = asyncio.create_task(gone.wait())
        try:
            done, _ = await asyncio.wait({work, waiting}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                await work
                return
            late = not done
            await _cancelled(work)
            if late and not began:
                answer = openai_error(
                    504, f"The answer took longer than {self._seconds:g} s.", "request_timeout", headers={"Retry-After": "10"}
                )
                await answer(scope, receive, send)
            elif late:
                error = error_body(504, f"The answer took longer than {self._seconds:g} s.", "request_timeout")
                body = f"data: {json.dumps(error)}\n\n".encode() if streams else b""
                await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            for task in (work, listener, waiting):
                await _cancelled(task)


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended: what it holds is given back before its successor comes."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


class Headed:
    """Headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, _with_headers(send, _CLOSING) if scope["type"] == "http" else send)


def _with_headers(send: Send, headers: list[tuple[bytes, bytes]]) -> Callable[[Message], Awaitable[None]]:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start" and headers:
            there = {name for name, _ in message["headers"]}
            message = {**message, "headers": [*message["headers"], *(h for h in headers if h[0] not in there)]}
        await send(message)

    return sent


def _secret(headers: Headers) -> str | None:
    """The key of a request, in the places where clients put it."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and bearer.strip():
        return bearer.strip()
    return headers.get("x-api-key") or headers.get("api-key")
