"""The HTTP API in front of all models: OpenAI's routes, one route per model, health, readiness, metrics.

Answers are those of ``ray.serve.llm`` (and so of vLLM). Models are not bound at deployment, as in ``ray.serve.llm``'s
ingress, but looked up in Ray Serve's controller, so they can be added and removed without redeploying it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Body as FromBody
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionResponse, ErrorResponse
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.generate.base.protocol import StreamOptions

from llm_ray.conf.engines import ENGINES
from llm_ray.serve import directory
from llm_ray.serve.directory import Deployed
from llm_ray.serve.gateway import openapi
from llm_ray.serve.gateway.errors import STREAM_ERROR, ApiError, failed, invalid, refused, refused_in_stream
from llm_ray.serve.gateway.finetuning.routes import Operations
from llm_ray.serve.gateway.finetuning.service import PREFIX, Named, Service
from llm_ray.serve.gateway.metrics import Metrics, Watch
from llm_ray.serve.gateway.protect.errors import openai_error
from llm_ray.serve.gateway.protect.keys import Key
from llm_ray.serve.gateway.protect.limits import cap_tokens
from llm_ray.serve.gateway.requests import Chat, Completion, Detokenize, Embedding, Tokenize
from llm_ray.serve.gateway.scopes import check_scope, is_admin, key_of
from llm_ray.serve.gateway.simple import SimpleRequest

# How old the list of models may be, in seconds, before it is looked up again: beside a request, before it, for a name
# that is not known.
_FRESH = 1.0
_OLD = 10.0
_LOOK_AGAIN = 0.2
# How long an answer is waited for before it is looked whether its model is still there.
_STILL_THERE = 1.0
# How long the controller has for an answer.
_ANSWERS_WITHIN = 5.0


@dataclass(frozen=True)
class Target:
    """Where requests for a name go: a model, or an adapter on it."""

    name: str
    entry: Deployed
    adapter: bool


class Api:
    """The routes, and what they know: the models, their handles, and the counters."""

    def __init__(self) -> None:
        self.draining = False
        self.metrics = Metrics()
        self._models: dict[str, Deployed] = {}
        self._targets: dict[str, Target] = {}
        self._handles: dict[str, DeploymentHandle] = {}
        self._looked = 0.0
        self._lock = asyncio.Lock()
        self._looking: asyncio.Task[bool] | None = None
        self._finetuning: Service | None = None
        self.app = _build(self, None)

    def offer(self, service: Service, enabled: bool) -> None:
        """Answer the fine-tuning API from now on, where it is `enabled`. Whose the models of its jobs are is heeded either
        way."""
        self._finetuning = service
        self.app = _build(self, Operations(service, self._named, lambda: self.draining) if enabled else None)

    # The models -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Look up the models, which fails where there is no controller."""
        await self._look(_OLD)

    async def _look(self, age: float) -> None:
        """Look up the models, unless that was done within `age` seconds."""
        async with self._lock:
            if self._looked and time.monotonic() - self._looked < age:
                return
            controller = _get_global_client()._controller
            details = await controller.get_serve_instance_details.remote()
            self._models = directory.deployed(details)
            self._targets = {}
            for name, entry in self._models.items():
                self._targets |= {adapter: Target(adapter, entry, True) for adapter in entry.model.adapters}
                self._targets[name] = Target(name, entry, False)
            for name in self._handles.keys() - self._models.keys():
                del self._handles[name]
            self._looked = time.monotonic()

    async def _refresh(self, age: float) -> bool:
        """Look up the models as `_look` does; False when the controller does not answer, as while it restarts: they are
        as they were."""
        try:
            await asyncio.wait_for(self._look(age), _ANSWERS_WITHIN)
        except Exception:
            return False
        return True

    async def _refresh_if_old(self) -> None:
        """Look up the models beside the request that is answered, or before it if that was long ago."""
        age = time.monotonic() - self._looked
        if age > _OLD:
            await self._refresh(_OLD)
        elif age > _FRESH and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._refresh(_FRESH))

    def _visible(self, request: Request) -> dict[str, Target]:
        """The targets that the request's key may ask."""
        key = key_of(request)
        return {name: target for name, target in sorted(self._targets.items()) if self._may_ask(name, key)}

    def _may_ask(self, name: str, key: Key | None) -> bool:
        """Whether a key's requests may go to a model: one that a job of the fine-tuning API has made is its owner's, and
        admins'."""
        service = self._finetuning
        made = None
        if service and name.startswith(PREFIX):
            made = service.may_ask(service.owner_of(key.name if key else None), name)
        if made is not None:
            return made or is_admin(key)
        return not key or key.models is None or name in key.models

    async def _named(self, model: str, request: Request) -> Named | None:
        """The model that the request's key may ask under this name, for a job."""
        await self._refresh_if_old()
        target = self._visible(request).get(model)
        if target is None:
            return None
        served = target.entry.model
        return Named(model, served.path, target.adapter, ENGINES[served.engine].converts)

    async def _target(self, name: str | None, request: Request) -> Target:
        """Where requests for `name` go. Raises ApiError."""
        await self._refresh_if_old()
        visible = self._visible(request)
        if name not in visible:
            if not await self._refresh(_LOOK_AGAIN):
                raise ApiError(
                    503, "The endpoint cannot look up its models now; retry.", "controller_lost", retry_after=2
                )
            visible = self._visible(request)
        available = ", ".join(visible) or "none"
        if name is None:
            if len(visible) != 1:
                raise ApiError(400, f"model is missing. Available: {available}.", "model_missing", param="model")
            return next(iter(visible.values()))
        if name not in visible:
            raise ApiError(
                404,
                f"The model `{name[:200]}` does not exist here. Available: {available}.",
                "model_not_found",
                param="model",
            )
        return visible[name]

    async def of_path(self, model: str, request: Request) -> None:
        """Raises ApiError for a path that names no model, before its body is looked at."""
        await self._target(model, request)

    def _handle(self, target: Target) -> DeploymentHandle:
        name = target.entry.model.name
        if name not in self._handles:
            handle = serve.get_deployment_handle(directory.DEPLOYMENT, directory.app_name(name), _check_exists=False)
            self._handles[name] = handle.options(stream=True)
        return self._handles[name]

    # Asking a model ---------------------------------------------------------------------------------------------------

    async def _first(self, target: Target, method: str, body: Any) -> tuple[Any, Any]:
        """The first piece of the answer, and the stream of the rest. Raises ApiError for whatever the model does not
        do.

        Nothing of the HTTP request but its body goes to the model: headers could set priorities, ids, and caches of
        other requests.
        """
        for attempt in (1, 2):
            try:
                stream = getattr(self._handle(target), method).remote(body)
                first = await self._awaited(stream, target)
            except RayActorError as error:
                if attempt == 1:  # nothing has been sent yet: another replica, or its successor, can answer
                    continue
                raise failed(error, target.name, target.entry) from error
            except ApiError:
                raise
            except Exception as error:
                raise failed(error, target.name, target.entry) from error
            piece = first[0] if isinstance(first, list) and first else first
            if isinstance(piece, ErrorResponse):
                raise refused(piece)
            if isinstance(piece, str) and (error_told := refused_in_stream(piece)):
                raise error_told
            return first, stream
        raise AssertionError

    async def _awaited(self, stream: Any, target: Target) -> Any:
        """The first piece; Serve waits for ever for replicas of a model that was taken away meanwhile, and a replica
        for an adapter that it may be about to get. Raises ApiError."""
        first = asyncio.ensure_future(anext(stream))
        try:
            while not (await asyncio.wait({first}, timeout=_STILL_THERE))[0]:
                await self._refresh(_FRESH)
                if target.name not in self._targets:
                    raise ApiError(404, f"The model `{target.name}` was removed.", "model_not_found", param="model")
            return first.result()
        finally:
            if not first.done():
                stream.cancel()
                first.cancel()

    async def _answer(self, method: str, body: Chat | Completion, request: Request) -> Any:
        """The answer to a chat or a completion: a response of vLLM's, or the events of a stream. Raises ApiError."""
        target = await self._begin(body, request)
        if refusal := _too_much(body, target) or _over_key(body, target, request):
            raise refusal
        watch = self.metrics.begin(target.name)
        request.scope["state"]["llm_ray_counted"] = True
        try:
            hidden = bool(body.stream) and _ask_for_usage(body)
            first, rest = await self._first(target, method, body)
            if not body.stream:
                watch.usage(first.usage.prompt_tokens, first.usage.completion_tokens or 0)
                watch.end(200)
                return first
        except ApiError as error:
            watch.end(error.status)
            raise
        except BaseException:
            watch.end()
            raise
        return _Stream(first, rest, watch, hidden, target)

    async def _begin(self, body: Any, request: Request) -> Target:
        """Where the body is to go; its model is named. Raises ApiError."""
        check_scope(request, "ask")
        if self.draining:
            raise ApiError(503, "This endpoint is being stopped.", "stopping", retry_after=5)
        target = await self._target(body.model, request)
        if target.entry.status == "DELETING":  # its replicas only answer what they have begun
            raise ApiError(503, f"The model `{target.name}` is being stopped.", "stopping", retry_after=5)
        body.model = target.name
        return target

    async def chat(self, body: Annotated[Chat, FromBody()], request: Request) -> Response:
        """Answer a conversation."""
        return _response(await self._answer("chat", body, request))

    async def completions(self, body: Annotated[Completion, FromBody()], request: Request) -> Response:
        """Continue a text, or several."""
        return _response(await self._answer("completions", body, request))

    async def embeddings(self, body: Annotated[Embedding, FromBody()], request: Request) -> Response:
        """Vectors of texts, by a model that makes some; others answer 400."""
        return await self._plain("embeddings", body, request)

    async def tokenize(self, body: Annotated[Tokenize, FromBody()], request: Request) -> Response:
        """The tokens of a text, or of a conversation as the model's chat template writes it."""
        return await self._plain("tokenize", body, request)

    async def detokenize(self, body: Annotated[Detokenize, FromBody()], request: Request) -> Response:
        """The text of tokens."""
        return await self._plain("detokenize", body, request)

    async def _plain(self, method: str, body: Any, request: Request) -> Response:
        target = await self._begin(body, request)
        watch = self.metrics.begin(target.name)
        request.scope["state"]["llm_ray_counted"] = True
        try:
            result, _ = await self._first(target, method, body)
            if usage := getattr(result, "usage", None):
                watch.usage(usage.prompt_tokens, 0)
            watch.end(200)
        except ApiError as error:
            watch.end(error.status)
            raise
        finally:
            watch.end()
        return _response(result)

    async def simple(self, model: str, body: Annotated[SimpleRequest, FromBody()], request: Request) -> Response:
        """Ask one model: a text or a conversation in, text out. A list of texts gets a list of answers."""
        target = await self._target(model, request)
        served = target.entry.model
        if body.is_conversation and served.task != "chat":
            raise ApiError(
                400, f"The model `{target.name}` has no chat template: send text.", "invalid_request", param="text"
            )
        bodies = body.bodies(target.name, served.task == "chat")
        if body.stream and len(bodies) > 1:
            message = "stream: a list of texts cannot be streamed; send one text, or stream: false."
            raise ApiError(400, message, "invalid_request", param="stream")
        if len(bodies) > served.max_batch:
            raise _too_many(len(bodies), target, "text")
        method = "chat" if served.task == "chat" else "completions"
        try:
            async with asyncio.TaskGroup() as group:  # where one is refused, the others end
                asked = [group.create_task(self._answer(method, one, request)) for one in bodies]
        except BaseExceptionGroup as failed_ones:
            raise failed_ones.exceptions[0] from None
        answers = [task.result() for task in asked]
        if body.stream:
            return _Streamed(_texts(answers[0].events()), answers[0], "text/plain; charset=utf-8")
        results = [_simple_result(answer) for answer in answers]
        several = isinstance(body.text, list) and not body.is_conversation
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse(results if several else results[0])
        if several:
            return JSONResponse([result["text"] for result in results])
        return PlainTextResponse(results[0]["text"])

    # About the endpoint -----------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> dict[str, Any]:
        """The models and adapters that answer here."""
        await self._refresh(_FRESH)
        return {"object": "list", "data": [_card(target) for target in self._visible(request).values()]}

    async def model(self, model: str, request: Request) -> dict[str, Any]:
        """One model or adapter."""
        return _card(await self._target(model, request))

    async def health(self) -> dict[str, str]:
        """Whether the endpoint is alive."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Whether every model answers: 503 while one does not, or none is there."""
        for age in (_FRESH, _LOOK_AGAIN):  # what has just been deployed is ready at once
            await self._refresh(age)
            states = {name: "ready" if entry.ready else entry.status.lower() for name, entry in self._models.items()}
            good = bool(states) and not self.draining and all(state == "ready" for state in states.values())
            if good:
                break
        return JSONResponse({"ready": good, "models": states}, 200 if good else 503)

    async def prometheus(self) -> Response:
        """Counters in Prometheus' text format."""
        await self._refresh(_FRESH)
        self.metrics.set_models(self._models)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def stats(self) -> dict[str, dict[str, float]]:
        """Of each model and adapter: requests, errors, requests in progress, tokens, tokens/s."""
        return {name: self.metrics.summary(name) for name in self._targets}

    @property
    def names(self) -> frozenset[str]:
        """What answers here."""
        return frozenset(self._targets)

    @property
    def in_progress(self) -> int:
        """Requests taken in and not answered yet."""
        return self.metrics.in_progress()

    async def idle(self) -> None:
        """Return when no request is in progress."""
        while self.in_progress:
            await asyncio.sleep(0.05)


def _build(api: Api, finetuning: Operations | None) -> FastAPI:
    app = openapi.app()
    openapi.get(app, "/health", api.health)
    openapi.get(app, "/ready", api.ready)
    openapi.get(app, "/metrics", api.prometheus)
    openapi.get(app, "/v1/models", api.models)
    openapi.get(app, "/v1/models/{model:path}", api.model)
    openapi.post(app, "/v1/chat/completions", api.chat)
    openapi.post(app, "/v1/completions", api.completions)
    openapi.post(app, "/v1/embeddings", api.embeddings)
    openapi.post(app, "/tokenize", api.tokenize)
    openapi.post(app, "/detokenize", api.detokenize)
    if finetuning:
        finetuning.add_to(app)
    openapi.post(app, "/{model:model}", api.simple, [Depends(api.of_path)])

    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "none")
        if isinstance(error.body, bytes) and not kind.partition(";")[0].strip().endswith("json"):
            message = f"The body's Content-Type is {kind[:100]}; it must be application/json."
            return openai_error(415, message, "unsupported_media_type")
        return invalid(error.errors(), error.body).response()

    async def http_error(request: Request, error: HTTPException) -> Response:
        if (
            error.status_code == 405
            and "model" in request.path_params
            and request.path_params["model"] not in api.names
        ):
            return openai_error(404, f"There is nothing at {request.url.path[:200]}.", "not_found")
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is nothing at {request.url.path[:200]}."
        elif error.status_code == 405:
            message = f"{request.method[:20]} is not supported at {request.url.path[:200]}."
        codes = {404: "not_found", 405: "method_not_allowed"}
        return openai_error(
            error.status_code, message, codes.get(error.status_code, "invalid_request"), headers=error.headers
        )

    async def defect(_: Request, error: Exception) -> Response:
        message = (
            f"{type(error).__name__}: this is a bug in the endpoint; its log has the details (llm-ray serve logs "
            "gateway)"
        )
        return openai_error(500, message, "internal_error")

    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    app.add_exception_handler(ApiError, api_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, not_valid)  # type: ignore[arg-type]
    app.add_exception_handler(StarletteHTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, defect)
    return app


# Requests -------------------------------------------------------------------------------------------------------------


def _too_much(body: Chat | Completion, target: Target) -> ApiError | None:
    """Why a request asks for too many answers at once: one request does not take more than the model computes at a
    time."""
    several = isinstance(body, Completion) and isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    answers = (body.n or 1) * (len(body.prompt) if several else 1)
    return _too_many(answers, target, "prompt" if several else "n") if answers > target.entry.model.max_batch else None


def _too_many(answers: int, target: Target, param: str) -> ApiError:
    most = target.entry.model.max_batch
    message = (
        f"{param}: the request asks for {answers} answers, but `{target.name}` computes {most} at a time: send "
        "several requests."
    )
    return ApiError(400, message, "too_many_answers", param=param)


def _over_key(body: Chat | Completion, target: Target, request: Request) -> ApiError | None:
    """Hold the request to the key's limit on an answer's tokens; why it is refused, if it asks for more."""
    cap = request.scope.get("state", {}).get("llm_ray_max_tokens")
    refusal = None if cap is None else cap_tokens(body, cap, target.entry.model.max_model_len)
    return ApiError(400, refusal, "max_tokens_exceeded", param="max_tokens") if refusal else None


def _ask_for_usage(body: Chat | Completion) -> bool:
    """Have the stream end with its usage, which is counted; returns whether the client is not to see it."""
    asked = bool(body.stream_options and body.stream_options.include_usage)
    if not asked:
        body.stream_options = StreamOptions(include_usage=True)
    return not asked


# Answers --------------------------------------------------------------------------------------------------------------


class _Stream:
    """A streamed answer that has begun."""

    def __init__(self, first: Any, rest: Any, watch: Watch, hidden: bool, target: Target) -> None:
        self._first, self._rest, self._watch, self._hidden, self._target = first, rest, watch, hidden, target

    async def events(self) -> AsyncGenerator[str, None]:
        """Its events, counted; an error in the middle becomes an event, for the headers are sent."""
        try:
            piece = self._first
            while True:
                text, error, reason = "".join(piece).partition(STREAM_ERROR)
                self._watch.token()
                if '"usage":{' in text:
                    text = _take_usage(text, self._watch, self._hidden)
                if text:
                    yield text
                if refusal := refused_in_stream(
                    error + reason
                ):  # vLLM goes on with [DONE]: here a stream that has it is whole
                    self._watch.end(refusal.status)
                    yield refusal.event()
                    return
                piece = await anext(self._rest)
        except StopAsyncIteration:
            self._watch.end(200)
        except Exception as error:
            refusal = failed(error, self._target.name, self._target.entry)
            self._watch.end(refusal.status)
            yield refusal.event()

    def close(self) -> None:
        """End it, and the engine's work for it, unless it has come to its end: its client is gone, or it took too
        long."""
        if not self._watch.ended:
            self._rest.cancel()
            self._watch.end()


class _Streamed(StreamingResponse):
    """The response with a streamed answer, which it closes however it ends."""

    def __init__(self, content: AsyncIterator[str], answer: _Stream, media_type: str) -> None:
        super().__init__(content, media_type=media_type)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


def _response(answer: Any) -> Response:
    if isinstance(answer, _Stream):
        return _Streamed(answer.events(), answer, "text/event-stream")
    return Response(answer.model_dump_json(), media_type="application/json")


def _take_usage(text: str, watch: Watch, hidden: bool) -> str:
    """Count the usage that comes with the last event of an answer, and leave that event out if the client did not ask
    for it."""
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


async def _texts(events: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The bare text of a stream of events."""
    async for chunk in events:
        for event in chunk.split("\n\n"):
            if not event.startswith("data: {"):
                continue
            data = json.loads(event.removeprefix("data: "))
            if "error" in data:
                raise ConnectionError(
                    data["error"]["message"]
                )  # the stream breaks off: the client must not take it for whole
            for choice in data["choices"]:
                if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                    yield text


def _simple_result(answer: Any) -> dict[str, Any]:
    choice = answer.choices[0]
    text = choice.text if isinstance(answer, CompletionResponse) else choice.message.content
    usage = openapi.Usage(**{name: getattr(answer.usage, name) or 0 for name in openapi.Usage.model_fields})
    return openapi.SimpleAnswer(
        text=text or "", finish_reason=choice.finish_reason, usage=usage, model=answer.model
    ).model_dump()


def _card(target: Target) -> dict[str, Any]:
    model = target.entry.model
    return openapi.Card(
        id=target.name,
        created=target.entry.created,
        root=model.name,
        parent=model.name if target.adapter else None,
        max_model_len=model.max_model_len,
        metadata=openapi.ModelInfo(engine=model.engine, precision=model.precision, ready=target.entry.ready),
    ).model_dump()
