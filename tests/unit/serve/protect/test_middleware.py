"""The protection before a small app, on a real server, asked by real clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_ray.conf.serve import Endpoint, Limits
from llm_ray.serve.protect import Protection, protect
from llm_ray.serve.protect.keys import add_key


class App:
    """Answers, streams, or works until it is cancelled, and tells of it."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/echo", self.echo, methods=["POST"]),
                Route("/work", self.work, methods=["POST"]),
                Route("/stream", self.stream, methods=["POST"]),
                Route("/health", lambda _: JSONResponse({})),
                Route("/v1/models", lambda _: JSONResponse({})),
            ]
        )

    async def echo(self, request: Request) -> Response:
        state = request.scope["state"]
        key = state["llm_ray_key"]
        return JSONResponse({"bytes": len(await request.body()), "key": key and key.name, "max_tokens": state["llm_ray_max_tokens"]})

    async def work(self, request: Request) -> Response:
        await request.body()
        await self._forever()
        return Response()

    async def stream(self, request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield "data: {}\n\n"
            await self._forever()

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _forever(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


Serve = Callable[..., contextlib.AbstractContextManager[tuple[App, httpx.Client]]]
OPEN = Protection.of(Endpoint())


@contextlib.contextmanager
def serve(**settings: Any) -> Iterator[tuple[App, httpx.Client]]:
    app = App()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(protect(app.app, dataclasses.replace(OPEN, **settings)), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", trust_env=False, timeout=20) as client:
                yield app, client
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def _error(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def test_bodies_are_limited_by_what_they_say_and_by_what_comes() -> None:
    with serve(max_body_bytes=1000) as (_, client):
        assert client.post("/echo", content=b"x" * 1000).json()["bytes"] == 1000
        assert _error(client.post("/echo", content=b"x" * 1001)) == (413, "body_too_large")
        assert _error(client.post("/echo", content=iter([b"x" * 600, b"x" * 600]))) == (413, "body_too_large")
        assert client.post("/echo", content=iter([b"x" * 500, b"x" * 500])).json()["bytes"] == 1000


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with serve(body_timeout_s=0.2) as (_, client), socket.create_connection((client.base_url.host, client.base_url.port or 0)) as slow:
        slow.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_who_has_no_key_is_not_let_in(tmp_path: Path) -> None:
    _, secret = add_key(tmp_path / "keys.json", "alice", Limits(max_tokens=7))
    with serve(keys_file=tmp_path / "keys.json") as (_, client):
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": secret}, {"Authorization": f"Basic {secret}"}):
            answer = client.post("/echo", headers=headers)
            assert _error(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models").status_code == 401
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
        assert client.get("/v1/models").status_code == 200


def test_requests_at_once_are_limited_until_one_ends() -> None:
    with serve(limits=Limits(concurrent=1)) as (app, client):
        with client.stream("POST", "/stream") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "data: {}"
            assert _error(client.post("/echo")) == (429, "rate_limit_exceeded")
        assert app.cancelled.wait(10)
        deadline = threading.Event()
        while client.post("/echo").status_code == 429 and not deadline.wait(0.02):
            pass


@pytest.mark.parametrize("path", ["/work", "/stream"])
def test_work_whose_client_is_gone_is_cancelled(path: str) -> None:
    with serve() as (app, client):
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as vanishing:
            vanishing.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            assert app.begun.wait(10)
        assert app.cancelled.wait(10)


def test_an_answer_that_takes_too_long_is_an_error_and_cancelled() -> None:
    with serve(request_timeout_s=0.2) as (app, client):
        assert _error(client.post("/work")) == (504, "request_timeout")
        assert app.cancelled.wait(10)


def test_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    with serve(request_timeout_s=0.2) as (app, client):
        events = [line for line in client.post("/stream").text.split("\n\n") if line]
        assert events[0] == "data: {}"
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "request_timeout"
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
        assert client.options("/echo", headers=asking).headers["access-control-allow-origin"] == "https://chat.example.org"
        assert "access-control-allow-origin" not in client.post("/echo", headers={"Origin": "https://evil.example"}).headers


def test_every_answer_is_closed_to_guessing_and_caches() -> None:
    with serve() as (_, client):
        headers = client.post("/echo").headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_settings_survive_the_way_to_the_replica(tmp_path: Path) -> None:
    settings = Protection.of(Endpoint(host="10.0.0.1", limits=Limits(concurrent=3), cors_origins=("https://a",)))
    assert settings.keys_file
    assert Protection.from_json(json.loads(json.dumps(settings.to_json()))) == settings
