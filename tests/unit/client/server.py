"""A small server on a real socket that speaks both forms, and fails in the ways that real ones do.

What a model does is in its name: `echo` answers with the prompt, a word a chunk; the others are in :data:`MODELS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.server import serving

MODELS = {
    "echo": "answers with the prompt",
    "busy": "429 with Retry-After the first time",
    "full": "always 429, without Retry-After",
    "waking": "503 with Retry-After the first time",
    "down": "503",
    "torn": "closes the connection in the middle of a stream",
    "short": "ends a stream without finish_reason",
    "error": "reports an error in the middle of a stream",
    "garbage": "answers with something that is no JSON",
    "foreign": "answers with JSON of another API",
    "page": "answers with a web page",
    "slow": "does not answer until the client goes",
    "picky": "400 for prompts with the word bad",
    "counted": "no usage",
}
KEY = "sk-right"
HTML = "<html><body>It works!</body></html>"


@dataclass
class Server:
    """Where it listens; the requests it had; how many were there at once; set `keys` to ask for one, `models` for what
    it lists."""

    base: str = ""
    keys: bool = False
    models: tuple[str, ...] = tuple(MODELS)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    now: int = 0
    most: int = 0
    gone: threading.Event = field(default_factory=threading.Event)

    def route(self, model: str) -> str:
        return f"{self.base}/{model}"

    @property
    def api(self) -> str:
        return f"{self.base}/v1"


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "t", "param": None, "code": status}}, status, headers)


@contextlib.contextmanager
def client_server() -> Iterator[Server]:
    """The server, on a free port, in a thread."""
    state = Server()
    app = Starlette(
        routes=[
            Route("/v1/models", functools.partial(_models, state)),
            Route("/v1/chat/completions", functools.partial(_openai, state), methods=["POST"]),
            Route("/v1/completions", functools.partial(_openai, state), methods=["POST"]),
            Route("/{model}", functools.partial(_route, state), methods=["POST"]),
        ]
    )
    with serving(app) as url:
        state.base = url
        yield state


def _refusal(state: Server, request: Request) -> Response | None:
    sent = request.headers.get("authorization")
    if not state.keys or sent == f"Bearer {KEY}":
        return None
    if sent == "Bearer sk-poor":
        return error(403, "this key may not use the model")
    return error(401, "Invalid API key" if sent else "No API key")


async def _models(state: Server, request: Request) -> Response:
    listed = [{"id": model, "object": "model", "created": 0, "owned_by": "test"} for model in state.models]
    return _refusal(state, request) or JSONResponse({"object": "list", "data": listed})


async def _answer(state: Server, request: Request, model: str, prompt: str) -> Response | None:
    """What goes wrong before the answer begins."""
    seen = sum(one.get("model") == model for one in state.requests)
    if model not in MODELS:
        return error(404, f"The model `{model}` does not exist.")
    if (model == "busy" and seen == 1) or model == "full":
        return error(429, "too many requests", {"Retry-After": "0"} if model == "busy" else None)
    if (model == "waking" and seen == 1) or model == "down":
        return error(503, "no replica", {"Retry-After": "0"} if model == "waking" else None)
    if model == "picky" and "bad" in prompt:
        return error(400, "bad is a bad word")
    if model == "foreign":
        return JSONResponse({"answer": prompt})
    if model == "page":
        return Response(HTML, media_type="text/html")
    if model == "slow":
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        state.gone.set()
    return None


def _words(prompt: str) -> list[str]:
    return [word if n == 0 else f" {word}" for n, word in enumerate(prompt.split(" "))]


async def _openai(state: Server, request: Request) -> Response:
    body = await request.json()
    state.requests.append(body)
    state.headers.append(dict(request.headers))
    if refused := _refusal(state, request):
        return refused
    chat = request.url.path.endswith("chat/completions")
    model, prompt = body["model"], body["messages"][-1]["content"] if chat else body["prompt"]
    if failed := await _answer(state, request, model, prompt):
        return failed
    words = _words(prompt)[: body.get("max_tokens")]
    finish = "length" if len(words) < len(_words(prompt)) else "stop"
    usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
    head = {"id": "1", "object": "chat.completion" if chat else "text_completion", "created": 0, "model": model}
    if not body.get("stream"):
        if model == "garbage":
            return Response('{"choices": [', media_type="application/json")
        text = "".join(words)
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse({**head, "choices": [{"index": 0, "finish_reason": finish, **content}], "usage": usage})

    def event(finish: str | None = None, **part: Any) -> bytes:
        return (
            b"data: "
            + json.dumps({**head, "choices": [{"index": 0, "finish_reason": finish, **part}]}).encode()
            + b"\n\n"
        )

    def said(word: str, finish: str | None = None) -> bytes:
        return event(finish, delta={"content": word}) if chat else event(finish, text=word)

    async def events() -> AsyncIterator[bytes]:
        state.now += 1
        state.most = max(state.most, state.now)
        try:
            if chat:
                yield event(delta={"role": "assistant", "content": ""})
            for n, word in enumerate(words):
                if model == "torn" and n == 1:
                    raise ConnectionAbortedError
                if model == "garbage" and n == 1:
                    yield b'data: {"choices": [\n\n'
                if model == "error" and n == 1:
                    yield b'data: {"error": {"message": "the engine died", "type": "t", "code": 500}}\n\n'
                    return
                yield said(word, finish if n == len(words) - 1 and model != "short" else None)
                await asyncio.sleep(0.002)
            if body.get("stream_options", {}).get("include_usage") and model != "counted":
                yield b"data: " + json.dumps({**head, "choices": [], "usage": usage}).encode() + b"\n\n"
            if model != "short":
                yield b"data: [DONE]\n\n"
        finally:
            state.now -= 1

    return StreamingResponse(events(), media_type="text/event-stream")


async def _route(state: Server, request: Request) -> Response:
    body, model = await request.json(), request.path_params["model"]
    state.requests.append({**body, "model": model})
    state.headers.append(dict(request.headers))
    text = body["text"] if isinstance(body["text"], str) else body["text"][-1]["content"]
    if failed := _refusal(state, request) or await _answer(state, request, model, text):
        return failed
    words = _words(text)[: body["config"].get("max_new_tokens")]
    if body["stream"]:

        async def pieces() -> AsyncIterator[bytes]:
            for n, word in enumerate(words):
                if model == "torn" and n == 1:
                    raise ConnectionAbortedError
                for byte in word.encode():  # characters come in parts
                    yield bytes([byte])

        return StreamingResponse(pieces(), media_type="text/plain")
    if request.headers["accept"] != "application/json":
        return PlainTextResponse("".join(words))
    if model == "garbage":
        return Response('{"text": ', media_type="application/json")
    usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
    return JSONResponse(
        {
            "text": "".join(words),
            "finish_reason": "length" if len(words) < len(_words(text)) else "stop",
            "usage": usage,
        }
    )
