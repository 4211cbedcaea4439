"""The HTTP API before all models: OpenAI's routes, a route of its own for each model, health, readiness, metrics.

Requests and answers are those of ``ray.serve.llm`` (and so of vLLM); its ingress is what this one extends: the models are not bound
when it is deployed but looked up in Ray Serve's controller, so that they come and go without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ErrorResponse,
    TokenizeCompletionRequest,
)
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from vllm.entrypoints.generate.base.protocol import StreamOptions

from llm_ray.serve import catalogue
from llm_ray.serve.catalogue import Deployed
from llm_ray.serve.gateway.metrics import Metrics, Watch
from llm_ray.serve.gateway.simple import SimpleRequest
from llm_ray.serve.protect.errors import openai_error
from llm_ray.serve.protect.limits import cap_tokens

# How old the list of models may be, in seconds; an unknown name has it looked up again.
_FRESH = 1.0
_LOOK_AGAIN = 0.2


def _tame(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """vLLM's validators raise whatever Python raises for what they did not expect; to the client all of it is a bad request."""
    try:
        return handler(value)
    except ValidationError:
        raise
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


# Bodies of requests, which fail with a 400 alone.
Chat = Annotated[ChatCompletionRequest, WrapValidator(_tame)]
Completion = Annotated[CompletionRequest, WrapValidator(_tame)]
Embedding = Annotated[EmbeddingRequest, WrapValidator(_tame)]
Tokenize = Annotated[TokenizeCompletionRequest, WrapValidator(_tame)]
Detokenize = Annotated[DetokenizeRequest, WrapValidator(_tame)]


@dataclass(frozen=True)
class Target:
    """Where requests for a name go: a model, or an adapter on it."""

    name: str
    entry: Deployed
    adapter: bool


class ApiError(Exception):
    """An answer with an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else None
        return openai_error(self.status, self.message, code=self.code, headers=headers)

    def event(self) -> str:
        """As an event of a stream whose headers have been sent."""
        return f"data: {json.dumps({'error': {'message': self.message, 'type': _type(self.status), 'param': None, 'code': self.code}})}\n\n"


class Api:
    """The routes, and what they know: the models, their handles, and the counters."""

    def __init__(self) -> None:
        self.draining = False
        self.metrics = Metrics()
        self._models: dict[str, Deployed] = {}
        self._targets: dict[str, Target] = {}
        self._handles: dict[tuple[str, str], DeploymentHandle] = {}
        self._looked = 0.0
        self._lock = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self.app = _build(self)

    # The models ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to follow the controller's list of models."""
        if self._watcher is None:
            await self._look(0)
            self._watcher = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_FRESH)
            with contextlib.suppress(Exception):  # the controller restarts: the models are as they were
                await self._look(_FRESH / 2)

    async def _look(self, age: float) -> None:
        """Look up the models, unless that was done within `age` seconds."""
        async with self._lock:
            if self._looked and time.monotonic() - self._looked < age:
                return
            controller = _get_global_client()._controller
            details = await controller.get_serve_instance_details.remote()
            self._models = catalogue.deployed(details)
            self._targets = {}
            for name, entry in self._models.items():
                self._targets |= {adapter: Target(adapter, entry, True) for adapter in entry.model.adapters}
                self._targets[name] = Target(name, entry, False)
            for key in [key for key in self._handles if key[0] not in self._models]:
                del self._handles[key]
            self.metrics.set_models({name: entry.replicas for name, entry in self._models.items()}, self._queued)
            self._looked = time.monotonic()

    def _queued(self, model: str, in_progress: int) -> int:
        entry = self._models[model]
        return max(0, in_progress - entry.replicas * entry.model.max_batch)

    async def _target(self, name: str | None, request: Request) -> Target:
        """Where requests for `name` go. Raises ApiError."""
        if name is None or name == "":
            if len(self._targets) != 1:
                raise ApiError(400, f"model is missing: name one of {', '.join(sorted(self._targets)) or 'none, for none is deployed'}")
            name = next(iter(self._targets))
        if name not in self._targets:
            await self._look(_LOOK_AGAIN)
        key = request.scope.get("state", {}).get("llm_ray_key")
        allowed = key.models if key else None
        target = self._targets.get(name)
        if target is None or (allowed and name not in allowed):
            names = sorted(n for n in self._targets if not allowed or n in allowed)
            raise ApiError(404, f"The model `{name}` does not exist here. There are: {', '.join(names) or 'none'}.", "model_not_found")
        return target

    def _handle(self, target: Target) -> DeploymentHandle:
        key = (target.entry.model.name, target.name if target.adapter else "")
        if key not in self._handles:
            handle = serve.get_deployment_handle(catalogue.DEPLOYMENT, catalogue.app_name(key[0]), _check_exists=False)
            self._handles[key] = handle.options(stream=True, multiplexed_model_id=key[1])
        return self._handles[key]

    # Asking a model --------------------------------------------------------------------------------------------------------

    async def _first(self, target: Target, method: str, body: Any, request: Request) -> tuple[Any, AsyncIterator[Any]]:
        """The first piece of the answer, and the rest. Raises ApiError for whatever the model does not do."""
        info = RawRequestInfo.from_starlette_request(request)
        for attempt in (1, 2):
            try:
                stream = getattr(self._handle(target), method).remote(body, info)
                first = await anext(stream)
            except RayActorError as error:
                if attempt == 1:  # nothing has been sent yet: another replica, or its successor, can answer
                    continue
                raise _explained(error, target) from error
            except Exception as error:
                raise _explained(error, target) from error
            if isinstance(first, list) and first and isinstance(first[0], ErrorResponse):
                first = first[0]
            if isinstance(first, ErrorResponse):
                raise ApiError(_status(first.error.code), first.error.message, first.error.type)
            return first, stream
        raise AssertionError

    async def _answer(self, method: str, body: Any, request: Request) -> Response:
        """The answer to a chat or a completion, whole or streamed."""
        if self.draining:
            raise ApiError(503, "This endpoint is being stopped.", "stopping", 5)
        target = await self._target(body.model, request)
        body.model = target.name
        _limit_tokens(body, request, target)
        watch = self.metrics.begin(target.entry.model.name)
        try:
            if not body.stream:
                result, _ = await self._first(target, method, body, request)
                watch.token()
                watch.usage(result.usage.prompt_tokens, result.usage.completion_tokens or 0)
                watch.end(200)
                return JSONResponse(result.model_dump())
            hidden = _ask_for_usage(body)
            first, rest = await self._first(target, method, body, request)
        except ApiError as error:
            watch.end(error.status)
            raise
        except BaseException:
            watch.end()  # cancelled: the client is gone
            raise
        return StreamingResponse(_events(first, rest, watch, hidden, target), media_type="text/event-stream")

    async def chat(self, body: Chat, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer("chat", _sanitize_chat_completion_request(body), request)

    async def completions(self, body: Completion, request: Request) -> Response:
        """Continue a text."""
        return await self._answer("completions", body, request)

    async def embeddings(self, body: Embedding, request: Request) -> Response:
        """Vectors of texts, by a model that makes some."""
        return await self._plain("embeddings", body, request)

    async def tokenize(self, body: Tokenize, request: Request) -> Response:
        """The tokens of a text."""
        return await self._plain("tokenize", body, request)

    async def detokenize(self, body: Detokenize, request: Request) -> Response:
        """The text of tokens."""
        return await self._plain("detokenize", body, request)

    async def _plain(self, method: str, body: Any, request: Request) -> Response:
        target = await self._target(body.model, request)
        body.model = target.name
        watch = self.metrics.begin(target.entry.model.name)
        try:
            result, _ = await self._first(target, method, body, request)
            if usage := getattr(result, "usage", None):
                watch.usage(usage.prompt_tokens, 0)
            watch.end(200)
        except ApiError as error:
            watch.end(error.status)
            raise
        finally:
            watch.end()
        return JSONResponse(result.model_dump())

    async def simple(self, model: str, body: SimpleRequest, request: Request) -> Response:
        """Ask one model: a text or a conversation in, text out."""
        target = await self._target(model, request)
        bodies = body.bodies(target.name, chat=target.entry.model.chat)
        if "messages" in bodies[0] and not target.entry.model.chat:
            raise ApiError(400, f"The model `{model}` has no chat template: send text in place of messages.")
        if body.stream and len(bodies) > 1:
            raise ApiError(400, "A list of texts cannot be streamed: send one text, or stream: false.")
        answers = await asyncio.gather(*(self._openai(one, request) for one in bodies))
        if body.stream:
            return StreamingResponse(_texts(answers[0].body_iterator), media_type="text/plain; charset=utf-8")  # type: ignore[attr-defined]
        results = [_simple_result(json.loads(bytes(answer.body))) for answer in answers]
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse(results[0] if len(results) == 1 and not isinstance(body.text, list) else results)
        if len(results) == 1 and (isinstance(body.text, str) or "messages" in bodies[0]):
            return PlainTextResponse(results[0]["text"])
        return JSONResponse([result["text"] for result in results])

    async def _openai(self, body: dict[str, Any], request: Request) -> Response:
        if "messages" in body:
            return await self.chat(ChatCompletionRequest(**body), request)
        return await self.completions(CompletionRequest(**body), request)

    # About the endpoint ----------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> dict[str, Any]:
        """The models that answer here."""
        key = request.scope.get("state", {}).get("llm_ray_key")
        allowed = key.models if key else None
        await self._look(_FRESH)
        return {"object": "list", "data": [_card(t) for n, t in sorted(self._targets.items()) if not allowed or n in allowed]}

    async def model(self, model: str, request: Request) -> dict[str, Any]:
        """One model."""
        return _card(await self._target(model, request))

    async def health(self) -> dict[str, str]:
        """Whether the endpoint is alive."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Whether every model answers."""
        await self._look(_FRESH)
        states = {name: "ready" if entry.ready else entry.status.lower() for name, entry in self._models.items()}
        good = bool(states) and not self.draining and all(state == "ready" for state in states.values())
        return JSONResponse({"ready": good, "models": states}, 200 if good else 503)

    async def prometheus(self) -> Response:
        """Counters in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def stats(self) -> dict[str, dict[str, float]]:
        """Of each model: requests, errors, requests in progress, tokens, tokens/s."""
        return {name: self.metrics.summary(name) for name in self._models}

    @property
    def in_progress(self) -> int:
        return sum(self.metrics.in_progress(name) for name in self._models)

    async def idle(self) -> None:
        """Return when no request is in progress."""
        while self.in_progress:
            await asyncio.sleep(0.05)


def _build(api: Api) -> FastAPI:
    app = FastAPI(title="LLM on Ray", description="Models on Ray Serve with OpenAI's API.", redoc_url=None)
    error = {"description": "An error in OpenAI's form: error.message, .type, .param, .code"}
    responses: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 408, 413, 429, 500, 503, 504), error)
    about: list[str | Enum] = ["endpoint"]
    ask: list[str | Enum] = ["models"]
    app.get("/health", tags=about)(api.health)
    app.get("/ready", tags=about, responses={503: error})(api.ready)
    app.get("/metrics", tags=about)(api.prometheus)
    app.get("/v1/models", tags=ask, responses={401: error})(api.models)
    app.get("/v1/models/{model:path}", tags=ask, responses={401: error, 404: error})(api.model)
    app.post("/v1/chat/completions", tags=ask, responses=responses)(api.chat)
    app.post("/v1/completions", tags=ask, responses=responses)(api.completions)
    app.post("/v1/embeddings", tags=ask, responses=responses)(api.embeddings)
    app.post("/tokenize", tags=ask, responses=responses)(api.tokenize)
    app.post("/detokenize", tags=ask, responses=responses)(api.detokenize)
    app.post("/{model:path}", tags=ask, responses=responses)(api.simple)
    app.add_exception_handler(ApiError, lambda _, error: error.response())
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(StarletteHTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _defect)
    return app


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0] if error.errors() else {"msg": "it cannot be read", "loc": ()}
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    return openai_error(400, f"{place}: {first['msg']}", param=place, code="invalid_request")


async def _http_error(_: Request, error: HTTPException) -> Response:
    return openai_error(error.status_code, str(error.detail), headers=error.headers)


async def _defect(_: Request, error: Exception) -> Response:
    return openai_error(500, f"{type(error).__name__}: this is a defect of the endpoint; its log has the details", code="internal_error")


def _type(status: int) -> str:
    return "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"


def _status(code: object) -> int:
    """An HTTP status of what an engine calls its error's code; what is neither the client's nor a known one is ours."""
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _explained(error: Exception, target: Target) -> ApiError:
    """The error that a client sees for what Ray or the engine raised."""
    name = target.name
    if isinstance(error, BackPressureError):
        return ApiError(
            429, f"The model `{name}` has as many requests waiting as it may (max_queue {target.entry.model.max_queue}).", "queue_full", 1
        )
    if isinstance(error, DeploymentUnavailableError):
        return ApiError(
            503, f"The model `{name}` does not start: {target.entry.message or 'see llm-ray serve status'}", "model_unavailable", 10
        )
    if isinstance(error, RayActorError):
        return ApiError(503, f"A replica of the model `{name}` was lost while it answered; ask again.", "replica_lost", 1)
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, (ValueError, TypeError)) or type(cause).__name__ in ("VLLMClientError", "VLLMValidationError", "ValidationError"):
        return ApiError(400, str(cause) or type(cause).__name__, "invalid_request")
    if type(cause).__name__ in ("EngineDeadError", "EngineGenerateError"):
        return ApiError(503, f"The engine of the model `{name}` failed while it answered; ask again.", "engine_failed", 1)
    return ApiError(
        500, f"The model `{name}` failed: {type(cause).__name__}; its log has the details (llm-ray serve logs {name})", "internal_error"
    )


def _limit_tokens(body: Any, request: Request, target: Target) -> None:
    """The key's limit on an answer's tokens. Raises ApiError for a request that asks for more."""
    cap = request.scope.get("state", {}).get("llm_ray_max_tokens")
    if cap is not None and (refusal := cap_tokens(body, cap, target.entry.model.max_model_len)):
        raise ApiError(400, refusal, "max_tokens_exceeded")


def _ask_for_usage(body: Any) -> bool:
    """Have the stream end with its usage, which is counted; returns whether the client is not to see it."""
    asked = bool(body.stream_options and body.stream_options.include_usage)
    if not asked:
        body.stream_options = StreamOptions(include_usage=True)
    return not asked


async def _events(first: Any, rest: AsyncIterator[Any], watch: Watch, hidden: bool, target: Target) -> AsyncGenerator[str, None]:
    """The events of a stream, counted; an error in the middle becomes an event, for the headers are sent."""
    status = 499
    try:
        piece = first
        while True:
            text = "".join(piece) if isinstance(piece, list) else str(piece)
            watch.token()
            if '"usage":{' in text:
                text = _take_usage(text, watch, hidden)
            if text:
                yield text
            piece = await anext(rest)
    except StopAsyncIteration:
        status = 200
    except Exception as error:
        explained = _explained(error, target)
        status = explained.status
        yield explained.event()
    finally:
        watch.end(status)


def _take_usage(text: str, watch: Watch, hidden: bool) -> str:
    """Count the usage that comes with the last event of an answer, and leave that event out if the client did not ask for it."""
    kept = []
    for event in text.split("\n\n"):
        if '"usage":{' in event:
            data = json.loads(event.removeprefix("data: "))
            usage = data["usage"]
            watch.usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0)
            if hidden and not data["choices"]:
                continue
        if event:
            kept.append(f"{event}\n\n")
    return "".join(kept)


async def _texts(events: Any) -> AsyncGenerator[str, None]:
    """The bare text of a stream of events."""
    async for chunk in events:
        for event in str(chunk).split("\n\n"):
            if not event.startswith("data: {"):
                continue
            data = json.loads(event.removeprefix("data: "))
            if "error" in data:
                raise ConnectionError(data["error"]["message"])  # the stream breaks off: the client must not take it for whole
            for choice in data["choices"]:
                if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                    yield text


def _simple_result(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    usage = {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return {"text": text or "", "finish_reason": choice["finish_reason"], "usage": usage, "model": answer["model"]}


def _card(target: Target) -> dict[str, Any]:
    model = target.entry.model
    return {
        "id": target.name,
        "object": "model",
        "created": target.entry.created,
        "owned_by": "llm-ray",
        "root": model.name,
        "parent": model.name if target.adapter else None,
        "max_model_len": model.max_model_len,
        "metadata": {"engine": model.engine, "precision": model.precision, "ready": target.entry.ready},
    }
