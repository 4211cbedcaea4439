"""The protection before a small app, on a real server, asked by real clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_ray.conf.serve import Endpoint, Limits
from llm_ray.serve.gateway.protect import Protection, protect
from llm_ray.serve.gateway.protect.keys import add_key, revoke_key
from llm_ray.serve.gateway.protect.limits import Limiter


class App:
    """Answers, streams, or works until it is cancelled, and tells of it."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.asked = 0
        self.app = Starlette(
            routes=[
                Route("/echo", self.echo, methods=["POST"]),
                Route("/work", self.work, methods=["POST"]),
                Route("/stream", self.stream, methods=["POST"]),
                Route("/text", self.text, methods=["POST"]),
                Route("/health", self.echo, methods=["POST"]),
                Route("/health", lambda _: JSONResponse({})),
                Route("/v1/models", lambda _: JSONResponse({})),
            ]
        )

    async def echo(self, request: Request) -> Response:
        state = request.scope["state"]
        key = state["llm_ray_key"]
        return JSONResponse(
            {"bytes": len(await request.body()), "key": key and key.name, "max_tokens": state["llm_ray_max_tokens"]}
        )

    async def work(self, request: Request) -> Response:
        await request.body()
        await self._forever()
        return Response()

    async def stream(self, _: Request) -> Response:
        return StreamingResponse(self._pieces(), media_type="text/event-stream")

    async def text(self, _: Request) -> Response:
        return StreamingResponse(self._pieces(), media_type="text/plain")

    async def _pieces(self) -> AsyncIterator[str]:
        yield "data: {}\n\n"
        await self._forever()

    async def _forever(self) -> None:
        self.asked += 1
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


Serve = Callable[..., contextlib.AbstractContextManager[tuple[App, httpx.Client]]]
HOME = Path("/srv/llm-ray")
OPEN = Protection.of(Endpoint(), HOME)


@contextlib.contextmanager
def serve(**settings: Any) -> Iterator[tuple[App, httpx.Client]]:
    app = App()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(
            uvicorn.Config(protect(app.app, dataclasses.replace(OPEN, **settings), Limiter()), log_level="error")
        )
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", trust_env=False, timeout=20
            ) as client:
                yield app, client
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def _error(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def _until(done: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < 10


async def _ask(
    app: ASGIApp, messages: list[Message], path: str = "/", wait: asyncio.Event | None = None
) -> tuple[int, bytes]:
    """Status and body of a request made of these messages; after them the client says nothing more, or is gone when
    `wait` is set."""
    rest = list(messages)
    status, body = 0, b""

    async def receive() -> Message:
        if rest:
            return rest.pop(0)
        await (wait or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, body
        status = message.get("status", status)
        body += message.get("body", b"")

    await app({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
    return status, body


def test_bodies_are_limited_by_what_they_say_and_by_what_comes() -> None:
    with serve(max_body_bytes=1000) as (_, client):
        assert client.post("/echo", content=b"x" * 1000).json()["bytes"] == 1000
        assert _error(client.post("/echo", content=b"x" * 1001)) == (413, "body_too_large")
        assert _error(client.post("/echo", content=iter([b"x" * 600, b"x" * 600]))) == (413, "body_too_large")
        assert client.post("/echo", content=iter([b"x" * 500, b"x" * 500])).json()["bytes"] == 1000
        assert _error(client.post("/echo", content=b"x" * 20_000_000)) == (413, "body_too_large"), (
            "read by a client that is sending still"
        )
        assert client.post("/echo", content=b"x").json()["bytes"] == 1


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_a_body_reaches_the_app_as_it_was_sent_or_not_at_all(chunks: list[bytes]) -> None:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert not message["more_body"]
        await Response(message["body"])({"type": "http"}, receive, send)

    sent = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks] + [{"type": "http.request"}]
    status, body = asyncio.run(_ask(protect(app, dataclasses.replace(OPEN, max_body_bytes=100), Limiter()), sent))
    whole = b"".join(chunks)
    assert (status, body) == (200, whole) if len(whole) <= 100 else status == 413


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with (
        serve(body_timeout_s=0.2) as (_, client),
        socket.create_connection((client.base_url.host, client.base_url.port or 0)) as slow,
    ):
        slow.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_who_has_no_key_is_not_let_in(tmp_path: Path) -> None:
    _, secret = add_key(tmp_path / "keys.json", "alice", Limits(max_tokens=7))
    with serve(keys_file=tmp_path / "keys.json") as (_, client):
        assert client.get("/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": secret},
            {"Authorization": f"Basic {secret}"},
        ):
            answer = client.post("/echo", headers=headers)
            assert _error(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models").status_code == 401
        assert client.post("/health").status_code == 401, "open is what is read there"
        for headers in (
            {"Authorization": f"Bearer {secret}"},
            {"authorization": f"bearer {secret}"},
            {"x-api-key": secret},
            {"api-key": secret},
        ):
            assert client.post("/echo", headers=headers).json() == {"bytes": 0, "key": "alice", "max_tokens": 7}


def test_over_its_limit_a_key_is_told_when_to_come_again(tmp_path: Path) -> None:
    _, secret = add_key(tmp_path / "keys.json", "alice", Limits(requests_per_minute=1))
    with serve(keys_file=tmp_path / "keys.json") as (_, client):
        client.headers["Authorization"] = f"Bearer {secret}"
        assert client.post("/echo").headers["x-ratelimit-remaining-requests"] == "0"
        answer = client.post("/echo")
        assert _error(answer) == (429, "rate_limit_exceeded")
        assert 50 < int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-ratelimit-reset-requests"] == f"{answer.headers['retry-after']}s"
        assert client.get("/v1/models").status_code == 200


def test_a_revoked_key_is_not_let_in_again(tmp_path: Path) -> None:
    _, secret = add_key(tmp_path / "keys.json", "alice", Limits())
    with serve(keys_file=tmp_path / "keys.json") as (_, client):
        client.headers["Authorization"] = f"Bearer {secret}"
        assert client.post("/echo").status_code == 200
        revoke_key(tmp_path / "keys.json", "alice")
        assert _error(client.post("/echo")) == (401, "invalid_api_key")


def test_the_log_names_keys_by_their_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    key, secret = add_key(tmp_path / "keys.json", "alice", Limits(requests_per_minute=1))
    with serve(keys_file=tmp_path / "keys.json") as (_, client):
        for sent in (secret, secret, secret[:-1]):
            client.post("/echo", headers={"Authorization": f"Bearer {sent}"})
        client.post("/a%0Ab")
    said = [record.message for record in caplog.records if record.name == "ray.serve"]
    assert {re.sub(r"\d+\.\d\d s$", "… s", line) for line in said} == {
        f"POST '/echo' of key {key.id}: … s",
        f"POST '/echo' of key {key.id} refused: Rate limit reached: 1 requests per minute.",
        "POST '/echo' from 127.0.0.1 refused: an API key that is not valid",
        "POST '/a\\nb' from 127.0.0.1 refused: no API key",
    }
    assert secret.partition(key.id)[2][1:-1] not in caplog.text


def test_requests_at_once_are_limited_until_one_ends() -> None:
    with serve(limits=Limits(concurrent=1)) as (app, client):
        with client.stream("POST", "/stream") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "data: {}"
            assert _error(client.post("/echo")) == (429, "rate_limit_exceeded")
        assert app.cancelled.wait(10)
        _until(lambda: client.post("/echo").status_code == 200)


def test_who_asks_one_after_the_other_is_never_over_its_limit_of_one_at_once() -> None:
    with serve(limits=Limits(concurrent=1)) as (_, client):
        assert [client.post("/echo").status_code for _ in range(200)] == [200] * 200


@pytest.mark.parametrize("path", ["/work", "/stream"])
def test_work_whose_client_is_gone_is_cancelled(path: str) -> None:
    with serve() as (app, client):
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as vanishing:
            vanishing.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            assert app.begun.wait(10)
        assert app.cancelled.wait(10)


WHOLE: Message = {"type": "http.request", "body": b"{}", "more_body": False}


class Slow:
    """An app that takes its time to end when it is cancelled, and to do something after its answer."""

    def __init__(self, answers: bool) -> None:
        self._answers = answers
        self.begun, self.cancelled, self.may_end, self.ended = (
            asyncio.Event(),
            asyncio.Event(),
            asyncio.Event(),
            asyncio.Event(),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.begun.set()
        try:
            if self._answers:
                await Response(b"done")({"type": "http"}, receive, send)
            else:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            await self.may_end.wait()
            self.ended.set()


def test_changed_settings_know_what_was_asked_before() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response()(scope, receive, send)

    async def run() -> list[int]:
        limiter = Limiter()
        settings = [dataclasses.replace(OPEN, limits=Limits(requests_per_minute=count)) for count in (1, 2, 2)]
        return [(await _ask(protect(app, each, limiter), [WHOLE]))[0] for each in settings]

    assert asyncio.run(run()) == [200, 200, 429]


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_slot_is_free_when_the_work_has_ended_not_before(who: str) -> None:
    """The server is Ray Serve's replica, which cancels the request of a client that is gone."""

    async def run() -> None:
        slow, gone = Slow(answers=False), asyncio.Event()
        app = protect(slow, dataclasses.replace(OPEN, limits=Limits(concurrent=1)), Limiter())
        request = asyncio.create_task(_ask(app, [WHOLE], wait=gone))
        await slow.begun.wait()
        if who == "client":
            gone.set()
        else:
            request.cancel()
        await slow.cancelled.wait()
        assert (await _ask(app, [WHOLE]))[0] == 429
        assert not request.done()
        slow.may_end.set()
        await asyncio.wait({request})
        assert slow.ended.is_set()
        assert request.cancelled() == (who == "server")
        again = asyncio.create_task(_ask(app, [WHOLE]))
        slow.begun.clear()
        await slow.begun.wait()
        again.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_the_app_does_after_its_answer_is_not_cancelled_when_the_client_goes() -> None:
    async def run() -> None:
        slow, gone = Slow(answers=True), asyncio.Event()
        request = asyncio.create_task(_ask(protect(slow, OPEN, Limiter()), [WHOLE], wait=gone))
        await slow.begun.wait()
        gone.set()
        await asyncio.wait({request}, timeout=0.05)
        assert not slow.cancelled.is_set()
        slow.may_end.set()
        assert await request == (200, b"done")
        assert slow.ended.is_set()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_connection_that_breaks_is_a_client_that_is_gone() -> None:
    async def run() -> None:
        slow = Slow(answers=False)
        slow.may_end.set()
        messages = [WHOLE]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            raise ConnectionError

        async def send(_: Message) -> None:
            raise AssertionError

        await protect(slow, OPEN, Limiter())(
            {"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send
        )
        assert slow.cancelled.is_set()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_the_app_raises_is_the_servers() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError, match="defect"):
        asyncio.run(_ask(protect(app, OPEN, Limiter()), [WHOLE]))


def test_websockets_are_closed() -> None:
    async def run() -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await protect(App().app, OPEN, Limiter())(
            {"type": "websocket", "path": "/health", "headers": []}, receive, send
        )
        return sent

    assert asyncio.run(run()) == [{"type": "websocket.close", "code": 1008}]


def test_an_answer_that_takes_too_long_is_an_error_and_cancelled() -> None:
    with serve(request_timeout_s=0.2) as (app, client):
        assert _error(client.post("/work")) == (504, "request_timeout")
        assert app.cancelled.wait(10)


def test_openais_client_does_not_have_the_same_work_begun_thrice() -> None:
    with (
        serve(request_timeout_s=0.2) as (app, client),
        openai.OpenAI(api_key="none", base_url=client.base_url, http_client=httpx.Client(trust_env=False)) as asking,
    ):
        with pytest.raises(openai.InternalServerError, match="The answer took longer"):
            asking.post("/work", cast_to=object, body={})
        assert app.asked == 1


def test_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    with serve(request_timeout_s=0.2) as (app, client):
        events = [line for line in client.post("/stream").text.split("\n\n") if line]
        assert events[0] == "data: {}"
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert app.cancelled.wait(10)


def test_an_answer_that_is_no_stream_of_events_breaks_off() -> None:
    with serve(request_timeout_s=0.2) as (app, client):
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            client.post("/text")
        assert app.cancelled.wait(10)


def test_pages_of_other_origins_are_let_in_only_where_they_are_named() -> None:
    asking = {
        "Origin": "https://chat.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with serve() as (_, client):
        assert "access-control-allow-origin" not in client.post("/echo", headers=asking).headers
    with serve(cors_origins=("https://chat.example.org",)) as (_, client):
        allowed = client.options("/echo", headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
        assert "Retry-After" in client.post("/echo", headers=asking).headers["access-control-expose-headers"]
        assert (
            "access-control-allow-origin"
            not in client.post("/echo", headers={"Origin": "https://evil.example"}).headers
        )


def test_every_answer_is_closed_to_guessing_and_caches() -> None:
    with serve() as (_, client):
        headers = client.post("/echo").headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_settings_survive_the_way_to_the_replica(tmp_path: Path) -> None:
    settings = Protection.of(Endpoint(host="10.0.0.1", limits=Limits(concurrent=3), cors_origins=("https://a",)), HOME)
    assert settings.keys_file
    assert Protection.from_json(json.loads(json.dumps(settings.to_json()))) == settings
