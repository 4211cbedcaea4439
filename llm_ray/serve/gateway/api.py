"""The HTTP API in front of all models: OpenAI's routes, one route per model, health, readiness, metrics.

Answers are those of ``ray.serve.llm`` (and so of vLLM). Unlike in ``ray.serve.llm``'s ingress, models are not bound at
deployment but looked up in Ray Serve's controller, so they can be added and removed without redeploying the gateway.
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

# Maximum age of the model list in seconds: before it is refreshed in the background, before a request waits for a
# refresh, and for requests with an unknown name.
_FRESH = 1.0
_OLD = 10.0
_LOOK_AGAIN = 0.2
# Seconds between checks that the model of a waiting request still exists.
_STILL_THERE = 1.0
# Timeout for the controller, in seconds.
_ANSWERS_WITHIN = 5.0


@dataclass(frozen=True)
class Target:
    """Destination of requests for a name: a model, or an adapter on one."""

    name: str
    entry: Deployed
    adapter: bool


class Api:
    """The routes and their state: the models, their handles, and the metrics."""

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
        """Serves the fine-tuning API if `enabled`. Ownership of the models that its jobs made is enforced either
        way."""
        self._finetuning = service
        self.app = _build(self, Operations(service, self._named, lambda: self.draining) if enabled else None)

    # The models -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Looks up the models. Raises if there is no controller."""
        await self._look(_OLD)

    async def _look(self, age: float) -> None:
        """Looks up the models unless the list is younger than `age` seconds."""
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
        """Looks up the models like `_look`. Returns False, keeping the old list, if the controller does not answer, as
        during its restart."""
        try:
            await asyncio.wait_for(self._look(age), _ANSWERS_WITHIN)
        except Exception:
            return False
        return True

    async def _refresh_if_old(self) -> None:
        """Refreshes the models in the background; waits for them only if the list is very old."""
        age = time.monotonic() - self._looked
        if age > _OLD:
            await self._refresh(_OLD)
        elif age > _FRESH and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._refresh(_FRESH))

    def _visible(self, request: Request) -> dict[str, Target]:
        """Returns the targets that the request's key may use."""
        key = key_of(request)
        return {name: target for name, target in sorted(self._targets.items()) if self._may_ask(name, key)}

    def _may_ask(self, name: str, key: Key | None) -> bool:
        """Whether the key may use a model. Models made by jobs of the fine-tuning API are only for their owner and
        admins."""
        service = self._finetuning
        made = None
        if service and name.startswith(PREFIX):
            made = service.may_ask(service.owner_of(key.name if key else None), name)
        if made is not None:
            return made or is_admin(key)
        return not key or key.models is None or name in key.models

    async def _named(self, model: str, request: Request) -> Named | None:
        """Returns the model that the request's key may use under this name, for a job; None if there is none."""
        await self._refresh_if_old()
        target = self._visible(request).get(model)
        if target is None:
            return None
        served = target.entry.model
        return Named(model, served.path, target.adapter, ENGINES[served.engine].converts)

    async def _target(self, name: str | None, request: Request) -> Target:
        """Returns the target for `name`. Raises ApiError if it does not exist, or is ambiguous."""
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
        """Checks that the path names a model before the body is read. Raises ApiError."""
        await self._target(model, request)

    def _handle(self, target: Target) -> DeploymentHandle:
        name = target.entry.model.name
        if name not in self._handles:
            handle = serve.get_deployment_handle(directory.DEPLOYMENT, directory.app_name(name), _check_exists=False)
            self._handles[name] = handle.options(stream=True)
        return self._handles[name]

    # Asking a model ---------------------------------------------------------------------------------------------------

    async def _first(self, target: Target, method: str, body: Any) -> tuple[Any, Any]:
        """Returns the first piece of the answer, and the stream of the rest. Raises ApiError for every failure.

        Only the HTTP request's body is passed on: headers could set priorities, ids, or other requests' caches.
        """
        for attempt in (1, 2):
            try:
                stream = getattr(self._handle(target), method).remote(body)
                first = await self._awaited(stream, target)
            except RayActorError as error:
                if attempt == 1:  # nothing was sent yet, so another replica can answer
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
        """Returns the first piece. While waiting, checks that the model still exists: Serve waits forever for replicas
        of a removed model, and a replica waits for an adapter that may still arrive. Raises ApiError."""
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
        """Returns vLLM's response to a chat or a completion, or a stream of events. Raises ApiError."""
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
        """Returns the target of the body and sets its model name. Raises ApiError."""
        check_scope(request, "ask")
        if self.draining:
            raise ApiError(503, "This endpoint is being stopped.", "stopping", retry_after=5)
        target = await self._target(body.model, request)
        if target.entry.status == "DELETING":  # its replicas only finish running requests
            raise ApiError(503, f"The model `{target.name}` is being stopped.", "stopping", retry_after=5)
        body.model = target.name
        return target

    async def chat(self, body: Annotated[Chat, FromBody()], request: Request) -> Response:
        """Create a chat completion."""
        return _response(await self._answer("chat", body, request))

    async def completions(self, body: Annotated[Completion, FromBody()], request: Request) -> Response:
        """Create completions of one or more prompts."""
        return _response(await self._answer("completions", body, request))

    async def embeddings(self, body: Annotated[Embedding, FromBody()], request: Request) -> Response:
        """Create embeddings of texts. Models without embeddings answer 400."""
        return await self._plain("embeddings", body, request)

    async def tokenize(self, body: Annotated[Tokenize, FromBody()], request: Request) -> Response:
        """Tokenize a text, or a conversation formatted with the model's chat template."""
        return await self._plain("tokenize", body, request)

    async def detokenize(self, body: Annotated[Detokenize, FromBody()], request: Request) -> Response:
        """Convert token ids to text."""
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
        """Send a text or a conversation to one model. The answer is text; a list of texts gets a list of answers."""
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
            async with asyncio.TaskGroup() as group:  # if one fails, the others are cancelled
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
        """List the models and adapters that are served."""
        await self._refresh(_FRESH)
        return {"object": "list", "data": [_card(target) for target in self._visible(request).values()]}

    async def model(self, model: str, request: Request) -> dict[str, Any]:
        """Retrieve a model or an adapter."""
        return _card(await self._target(model, request))

    async def health(self) -> dict[str, str]:
        """Check that the endpoint is alive."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Check that every model is ready. Answers 503 while a model is not ready, or none is deployed."""
        for age in (_FRESH, _LOOK_AGAIN):  # a model that was just deployed counts at once
            await self._refresh(age)
            states = {name: "ready" if entry.ready else entry.status.lower() for name, entry in self._models.items()}
            good = bool(states) and not self.draining and all(state == "ready" for state in states.values())
            if good:
                break
        return JSONResponse({"ready": good, "models": states}, 200 if good else 503)

    async def prometheus(self) -> Response:
        """Get metrics in Prometheus' text format."""
        await self._refresh(_FRESH)
        self.metrics.set_models(self._models)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def stats(self) -> dict[str, dict[str, float]]:
        """Returns requests, errors, requests in progress, tokens and tokens/s of each model and adapter."""
        return {name: self.metrics.summary(name) for name in self._targets}

    @property
    def names(self) -> frozenset[str]:
        """Names of the models and adapters that are served."""
        return frozenset(self._targets)

    @property
    def in_progress(self) -> int:
        """Number of accepted requests without a complete answer."""
        return self.metrics.in_progress()

    async def idle(self) -> None:
        """Waits until no request is in progress."""
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
    """Returns an error if a request asks for more answers than the model computes at a time, else None."""
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
    """Applies the key's limit on answer tokens to the request; returns an error if it asks for more, else None."""
    cap = request.scope.get("state", {}).get("llm_ray_max_tokens")
    refusal = None if cap is None else cap_tokens(body, cap, target.entry.model.max_model_len)
    return ApiError(400, refusal, "max_tokens_exceeded", param="max_tokens") if refusal else None


def _ask_for_usage(body: Chat | Completion) -> bool:
    """Makes the stream end with its usage, for the metrics; returns whether to hide it from the client."""
    asked = bool(body.stream_options and body.stream_options.include_usage)
    if not asked:
        body.stream_options = StreamOptions(include_usage=True)
    return not asked


# Answers --------------------------------------------------------------------------------------------------------------


class _Stream:
    """A streamed answer after its first piece."""

    def __init__(self, first: Any, rest: Any, watch: Watch, hidden: bool, target: Target) -> None:
        self._first, self._rest, self._watch, self._hidden, self._target = first, rest, watch, hidden, target

    async def events(self) -> AsyncGenerator[str, None]:
        """Yields the events and updates the metrics. Headers are already sent, so an error becomes an event."""
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
                ):  # vLLM then sends [DONE], which here marks a complete stream
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
        """Cancels the stream and the engine's work, unless it has ended: the client disconnected, or the request timed
        out."""
        if not self._watch.ended:
            self._rest.cancel()
            self._watch.end()


class _Streamed(StreamingResponse):
    """Response for a streamed answer; closes the answer in any case."""

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
    """Records the usage from an answer's last event, and drops that event if the client did not ask for it."""
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
    """Yields the text from a stream of events."""
    async for chunk in events:
        for event in chunk.split("\n\n"):
            if not event.startswith("data: {"):
                continue
            data = json.loads(event.removeprefix("data: "))
            if "error" in data:
                raise ConnectionError(
                    data["error"]["message"]
                )  # break the connection, so that the client sees that the answer is incomplete
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
