"""The endpoint's OpenAPI description, /openapi.json: routes, requests, answers and errors.

It reflects the deployed endpoint: it requires an API key if the endpoint does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.params import Depends
from pydantic import BaseModel, Field
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    EmbeddingResponse,
    TokenizeResponse,
)
from starlette.convertors import Convertor, register_url_convertor

import llm_ray
from llm_ray.conf.serve import MODEL_NAME, RESERVED_NAMES

_DESCRIPTION = """Models on Ray Serve with OpenAI's API: give any OpenAI client this endpoint's `/v1` as its base URL.

Errors come as `{"error": {"message": …, "type": …, "param": …, "code": …}}`: 4xx for errors that a client can fix, 5xx for others."""
_EVENTS = """data: {"object":"chat.completion.chunk","model":"support-bot","choices":[{"index":0,"delta":{"content":"Hello"}}]}

data: [DONE]

"""


class ErrorInfo(BaseModel):
    """Details of an error."""

    message: str
    type: str = Field(
        description="invalid_request_error, authentication_error, permission_error, rate_limit_error or server_error"
    )
    param: str | None = Field(description="The invalid field, if there is one.")
    code: str | None = Field(
        description="The reason, for programs: model_not_found, context_length_exceeded, queue_full, …"
    )


class Error(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorInfo


class ModelInfo(BaseModel):
    """How a model is served."""

    engine: str
    precision: str
    ready: bool


class Card(BaseModel):
    """A model, or an adapter on one."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When it was deployed, in seconds since 1970.")
    owned_by: str = "llm-ray"
    root: str = Field(description="The base model; for an adapter, the model it belongs to.")
    parent: str | None
    max_model_len: int = Field(description="Longest prompt and answer together, in tokens.")
    metadata: ModelInfo


class Cards(BaseModel):
    """The models and adapters that are served."""

    object: Literal["list"] = "list"
    data: list[Card]


class Health(BaseModel):
    """The endpoint is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether every model is ready, and the state of each."""

    ready: bool
    models: dict[str, str]


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SimpleAnswer(BaseModel):
    """Answer of a model's own route, for clients that accept JSON."""

    text: str
    finish_reason: str | None
    usage: Usage
    model: str


EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    }
}
"""Server-sent events. Uses OpenAPI 3.2's `itemSchema`, since some tools read `schema` as describing each event, others
the whole stream."""
_STREAM = {"text/event-stream": EVENT_STREAM["text/event-stream"] | {"example": _EVENTS}}
# Responses with status 200 by operation.
_ANSWERS: dict[str, dict[str, Any]] = {
    "health": {"model": Health},
    "ready": {"model": Readiness},
    "prometheus": {"content": {"text/plain": {"schema": {"type": "string"}}}},
    "models": {"model": Cards},
    "model": {"model": Card},
    "chat": {
        "model": ChatCompletionResponse,
        "content": _STREAM,
        "description": "The answer; with stream: true its events.",
    },
    "completions": {
        "model": CompletionResponse,
        "content": _STREAM,
        "description": "The answer; with stream: true its events.",
    },
    "embeddings": {"model": EmbeddingResponse},
    "tokenize": {"model": TokenizeResponse},
    "detokenize": {"model": DetokenizeResponse},
    "simple": {
        "model": SimpleAnswer | list[SimpleAnswer] | list[str],
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "The capital of France is Paris."}},
        "description": "The text, streamed with stream: true; JSON for a list of texts, and for clients that accept "
        "application/json.",
    },
}
ERRORS = {
    401: "The API key is missing or not valid.",
    400: "The request is invalid, or asks for something that the model does not support.",
    403: "The API key may not do this.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The model's queue is full, or the key's limits are reached: retry after Retry-After seconds.",
    500: "A bug in the endpoint.",
    503: "The model, or the whole endpoint, does not answer now: retry after Retry-After seconds.",
    504: "The answer took too long.",
}


class _ModelName(Convertor[str]):
    """Path segment that can be a model's name."""

    regex = (
        rf"(?!(?:{'|'.join(name.replace('.', '[.]') for name in sorted(RESERVED_NAMES))})(?:/|$)){MODEL_NAME.pattern}"
    )

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("model", _ModelName())


def app() -> FastAPI:
    """Returns an application without routes. Documentation pages are disabled because they load scripts from other
    hosts."""
    return FastAPI(
        title="LLM on Ray", version=llm_ray.__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None
    )


def get(app: FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
    """Registers a GET and a HEAD route at `path`."""
    about = path in ("/health", "/ready", "/metrics")
    errors = (500,) if about else (401, 404, 500, 503) if "{" in path else (401, 500, 503)
    responses = _responses(endpoint, errors)
    if path == "/ready":
        responses[503] = {"model": Readiness, "description": "A model does not answer, or none is deployed."}
    app.get(
        path,
        tags=["endpoint" if about else "models"],
        responses=responses,
        response_model=None,
        operation_id=endpoint.__name__,
        summary=summary(endpoint),
    )(endpoint)
    app.head(path, include_in_schema=False, response_model=None)(endpoint)


def post(app: FastAPI, path: str, endpoint: Callable[..., Any], dependencies: Sequence[Depends] = ()) -> None:
    """Registers a POST route at `path`; `dependencies` run before the body is read."""
    app.post(
        path,
        tags=["models"],
        responses=_responses(endpoint, tuple(ERRORS)),
        response_model=None,
        operation_id=endpoint.__name__,
        summary=summary(endpoint),
        dependencies=dependencies,
    )(endpoint)


def described(answer: dict[str, Any], errors: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    """Returns an operation's responses for FastAPI: `answer` with status 200, and the errors."""
    answers: dict[int | str, dict[str, Any]] = {200: {"description": "The answer."} | answer}
    for status in errors:
        answers[status] = {"model": Error, "description": ERRORS[status]}
    # With `default`, FastAPI does not add its own 422, which is never sent.
    answers["default"] = {"model": Error, "description": "An error."}
    return answers


def summary(endpoint: Callable[..., Any]) -> str:
    """Returns the first sentence of the operation's docstring."""
    return (endpoint.__doc__ or "").partition(".")[0].partition(":")[0]


def _responses(endpoint: Callable[..., Any], errors: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    return described(_ANSWERS[endpoint.__name__], errors)


def ask_for_keys(app: FastAPI, needed: bool) -> None:
    """Describes whether requests need an API key."""
    app.openapi_schema = None
    described = app.openapi()
    if needed:
        described["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "llm-ray serve keys add NAME"}
        }
        described["security"] = [{"key": []}]
        for path in ("/health", "/ready"):
            described["paths"][path]["get"]["security"] = []
