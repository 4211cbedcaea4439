"""ASGI middleware in front of the API: body sizes and timeouts, keys, limits, request timeouts, disconnected clients.
Plain ASGI keeps streams unbuffered.

Specification: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_ray.conf.serve import Limits
from llm_ray.serve.gateway.protect.errors import error_body, openai_error
from llm_ray.serve.gateway.protect.keys import Key, Keys, effective
from llm_ray.serve.gateway.protect.limits import Limiter

_LOG = logging.getLogger("ray.serve")
# Used without a key by load balancers and service managers.
_OPEN = frozenset({"/health", "/ready"})
_CLOSED = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
# OpenAI's clients retry after a 504, which would repeat work that was already too much.
_NOT_AGAIN = {"x-should-retry": "false"}
_GONE: Message = {"type": "http.disconnect"}
UPLOADS = "/v1/files"
"""Path whose bodies are streamed as files."""
_BESIDE_FILE = 2**16  # bytes of a form other than the file
_AHEAD = 8  # client messages to read ahead of the app


class Headed:
    """Adds headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, _with_headers(send, _CLOSED) if scope["type"] == "http" else send)


class Access:
    """Requires a valid key and enforces its limits. `keys` None: no key is required, and all clients share the common
    limits."""

    def __init__(self, app: ASGIApp, keys: Keys | None, common: Limits, limiter: Limiter) -> None:
        self._app, self._keys, self._common, self._limiter = app, keys, common, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the API has no websockets, and unchecked requests are refused
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or (scope["path"] in _OPEN and scope["method"] in ("GET", "HEAD")):
            await self._app(scope, receive, send)
            return
        key: Key | None = None
        if self._keys is not None:
            secret = _secret(Headers(scope=scope))
            key = self._keys.check(secret) if secret else None
            if key is None:
                text = "This API key is not valid." if secret else "An API key is required: Authorization: Bearer KEY"
                _LOG.warning(
                    f"{_asked(scope)} from {_client(scope)} refused: "
                    f"{'an API key that is not valid' if secret else 'no API key'}"
                )
                await openai_error(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})(
                    scope, receive, send
                )
                return
        limits = effective(key, self._common)
        state = scope.setdefault("state", {})
        state["llm_ray_key"] = key
        state["llm_ray_max_tokens"] = limits.max_tokens
        if scope["method"] != "POST":  # only POST requests are limited
            await self._app(scope, receive, send)
            return
        who = key.id if key else ""
        with contextlib.ExitStack() as slot:
            refusal = slot.enter_context(self._limiter.slot(who, limits))
            left = self._limiter.headers(who, limits)
            if refusal:
                if key:
                    _LOG.warning(f"{_asked(scope)} of key {key.id} refused: {refusal.message}")
                headers = {**left, "Retry-After": str(refusal.retry_after)}
                await openai_error(429, refusal.message, "rate_limit_exceeded", headers=headers)(scope, receive, send)
                return

            async def sent(message: Message) -> None:
                if _is_last(message):  # a client with the whole answer may send the next request at once
                    slot.close()
                await send(message)

            began = time.monotonic()
            try:
                await self._app(scope, receive, _with_headers(sent, left))
            finally:
                if key:
                    _LOG.info(f"{_asked(scope)} of key {key.id}: {time.monotonic() - began:.2f} s")


class Body:
    """Reads the body before the app runs: within `seconds`, and at most `most` bytes. Uploads, of at most `most_upload`
    bytes, are streamed to the app; for them `seconds` is the maximum pause between pieces."""

    def __init__(self, app: ASGIApp, most: int, seconds: float, most_upload: int = 0) -> None:
        self._app, self._most, self._seconds, self._most_upload = app, most, seconds, most_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._most_upload and scope["method"] == "POST" and scope["path"] == UPLOADS:
            await self._pass_on(scope, receive, send)
            return
        body = bytearray()
        declared = Headers(scope=scope).get("content-length", "0")
        too_large = declared.isdecimal() and int(declared) > self._most
        more = not too_large
        refusal: tuple[int, str, str] | None = None
        try:
            async with asyncio.timeout(self._seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    too_large = len(body) > self._most
                    more = message.get("more_body", False) and not too_large
        except TimeoutError:
            refusal = 408, f"The request's body did not arrive within {self._seconds:g} s.", "body_timeout"
        if too_large:
            refusal = 413, f"The request's body is larger than {self._most:,} bytes.", "body_too_large"
        if refusal:
            await openai_error(*refusal, headers={"Connection": "close"})(scope, receive, send)
            return
        rest: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        body.clear()

        async def again() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, again, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams an upload to the app with its size and pauses limited."""
        most, total, more = self._most_upload + _BESIDE_FILE, 0, True
        refusal: tuple[int, str, str] | None = None
        answered = False

        async def counted() -> Message:
            nonlocal total, more, refusal
            try:
                async with asyncio.timeout(self._seconds if more else None):
                    message = await receive()
            except TimeoutError:
                refusal = 408, f"Nothing of the request's body arrived for {self._seconds:g} s.", "body_timeout"
                return _GONE
            total += len(message.get("body", b""))
            more = more and message["type"] == "http.request" and message.get("more_body", False)
            if total > most:
                refusal = 413, f"The file is larger than {self._most_upload:,} bytes.", "body_too_large"
                return _GONE
            return message

        async def sent(message: Message) -> None:
            nonlocal answered
            answered = True
            if message["type"] == "http.response.start" and more:  # the rest of the body is not read
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            refusal = 413, f"The file is larger than {self._most_upload:,} bytes.", "body_too_large"
        else:
            await self._app(scope, counted, sent)
        if refusal and not answered:
            await openai_error(*refusal, headers={"Connection": "close"})(scope, receive, send)


class Deadline:
    """Cancels a request, in the app and the engine, that takes longer than `seconds` or whose client disconnects.

    The request ends, and frees its slot, only once that work has stopped. Neither FastAPI nor Starlette detects
    disconnects while an answer is computed. A late answer is 504, since the server is late; 408 is for a late body.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue(_AHEAD)
        answer = _Answer(send)
        work = asyncio.create_task(_awaited(self._app(scope, messages.get, answer)))
        client = asyncio.create_task(_listen(receive, messages))
        try:
            await asyncio.wait({work, client}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if answer.whole:  # the client has its answer; let the app finish
                await asyncio.wait({work}, timeout=self._seconds)
            if work.done():
                work.result()
                return
            late = not (client.done() or answer.whole)
            answer.closed = True
            await _stopped(work)
            if late:
                await self._expire(answer, scope, receive, send)
        finally:
            await _stopped(work)
            await _stopped(client)

    async def _expire(self, answer: _Answer, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"The answer took longer than {self._seconds:g} s."
        if not answer.begun:
            await openai_error(504, message, "request_timeout", headers=_NOT_AGAIN)(scope, receive, send)
        elif answer.of_events:
            body = f"data: {json.dumps(error_body(504, message, 'request_timeout'))}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            raise TimeoutError(message)  # break the connection, so that the client sees that the answer is incomplete


class _Answer:
    """Sends an answer and tracks its progress."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.whole = self.of_events = self.closed = False

    async def __call__(self, message: Message) -> None:
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            self.of_events = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        await self._send(message)
        self.whole = _is_last(message)


async def _listen(receive: Receive, messages: asyncio.Queue[Message]) -> None:
    """Forwards the client's messages until it disconnects."""
    with contextlib.suppress(Exception):  # the server's connection to the client broke
        while (message := await receive())["type"] != "http.disconnect":
            await messages.put(message)
    await messages.put(_GONE)


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def _stopped(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits until it has ended."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # retrieve the exception, so that asyncio does not log it


def _is_last(message: Message) -> bool:
    """Whether this message completes the response."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """Returns `send`, adding headers that the response does not set itself."""
    if not headers:
        return send

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            existing = MutableHeaders(raw=list(message["headers"]))
            for name, value in headers.items():
                existing.setdefault(name, value)
            message = {**message, "headers": existing.raw}
        await send(message)

    return sent


def _secret(headers: Headers) -> str | None:
    """Returns the request's key from the headers that clients use."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and bearer.strip():
        return bearer.strip()
    return headers.get("x-api-key") or headers.get("api-key")


def _asked(scope: Scope) -> str:
    """Returns method and path for the log, escaped to one line."""
    return f"{scope['method']} {scope['path']!r}"


def _client(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else "an unknown address"
