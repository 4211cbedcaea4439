"""Errors of requests in OpenAI's form: 4xx for the client's mistakes, 5xx for the server's, never a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMClientError, VLLMNotFoundError

from llm_ray.serve.directory import Deployed
from llm_ray.serve.gateway.protect.errors import error_body, openai_error

# Prefix of vLLM's error events; no other event can contain it.
STREAM_ERROR = 'data: {"error"'
_LONGEST = 1000  # maximum characters of a message
_TOO_LONG = re.compile(r"maximum context length|longer than the maximum model length|exceeds model's maximum")
_DEAD = "EngineCore encountered an issue"  # vLLM then refers to a stack trace that the client cannot see
_NO_TEMPLATE = re.compile(r"default chat template is no longer allowed")
# vLLM repeats the error's param at the end of the message.
_PARAMETER = re.compile(r" \(parameter=(?P<param>[\w.]+)(, value=.*)?\)$", re.DOTALL)
_WORDS = (
    (re.compile(r"^(Value error|Assertion failed), "), ""),
    (re.compile(r"^Input should "), "it should "),
    (re.compile(r"^Field required$"), "it is missing"),
    (re.compile(r"^Extra inputs are not permitted$"), "there is no such parameter"),
    (re.compile(r"valid dictionary( or (instance of \w+|object to extract fields from))?"), "valid object"),
    (re.compile(r"valid list"), "valid array"),
    (re.compile(r"List should "), "it should "),
    (re.compile(r"Dictionary should "), "it should "),
    (re.compile(r" after validation, not \d+"), ""),
    (re.compile(r"String should "), "it should "),
    (
        re.compile(r"Input tag '(.*)' found using '(\w+)' does not match any of the expected tags: "),
        r"its \2 is '\1', which is not one of ",
    ),
    (re.compile(r"Unable to extract tag using discriminator '(\w+)'"), r"its \1 is missing"),
)


class ApiError(Exception):
    """An error response in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        self.message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else None
        return openai_error(self.status, self.message, self.code, self.param, headers)

    def event(self) -> str:
        """Returns the error as an event, for a stream whose headers are sent."""
        return f"data: {json.dumps(error_body(self.status, self.message, self.code, self.param))}\n\n"


def refused(answer: ErrorResponse) -> ApiError:
    """Returns the error for a request that vLLM's front end refused."""
    return _told(answer.error.code, answer.error.message, answer.error.param)


def refused_in_stream(event: str) -> ApiError | None:
    """Returns the error in a stream's event, or None if it is no error event."""
    if not event.startswith(STREAM_ERROR):
        return None
    error = json.loads(event.removeprefix("data: ").partition("\n")[0])["error"]
    return _told(error.get("code"), error.get("message") or "", error.get("param"))


def _told(status: object, message: str, param: str | None) -> ApiError:
    if found := _PARAMETER.search(message):
        message, param = message[: found.start()], param or found["param"]
    if not isinstance(status, int) or not 400 <= status < 600:
        return ApiError(500, f"The engine says: {message}", "internal_error")
    if status >= 500:
        detail = "" if _DEAD in message else f" It says: {message}"
        return ApiError(503, f"The engine failed during the answer; retry.{detail}", "engine_failed", retry_after=1)
    if _NO_TEMPLATE.search(message):
        detail = (
            "The model has no chat template: use text completions (/v1/completions), or deploy it with one "
            "(chat_template)."
        )
        return ApiError(400, detail, "invalid_request", param="messages")
    code = (
        "context_length_exceeded"
        if _TOO_LONG.search(message)
        else "model_not_found"
        if status == 404
        else "invalid_request"
    )
    return ApiError(status, message, code, param=param)


def failed(error: Exception, name: str, entry: Deployed) -> ApiError:
    """Returns the error for an exception that Ray or the engine raised while the model `name` answered."""
    if isinstance(error, BackPressureError):
        text = f"The queue of the model `{name}` is full (max_queue {entry.model.max_queue})."
        return ApiError(429, text, "queue_full", retry_after=1)
    if isinstance(error, DeploymentUnavailableError):
        text = f"The model `{name}` does not start: {entry.message or 'see llm-ray serve status'}"
        return ApiError(503, text, "model_unavailable", retry_after=10)
    if isinstance(error, RayActorError):
        return ApiError(
            503,
            f"A replica of the model `{name}` was lost during the answer; retry.",
            "replica_lost",
            retry_after=1,
        )
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, VLLMClientError):
        return _told(
            404 if isinstance(cause, VLLMNotFoundError) else 400, str(cause), getattr(cause, "parameter", None)
        )
    if type(cause).__name__ in ("EngineDeadError", "EngineGenerateError"):
        return ApiError(
            503,
            f"The engine of the model `{name}` failed during the answer; retry.",
            "engine_failed",
            retry_after=1,
        )
    text = f"The model `{name}` failed: {type(cause).__name__}; its log has the details (llm-ray serve logs {entry.model.name})"
    return ApiError(500, text, "internal_error")


# Bodies that are not valid --------------------------------------------------------------------------------------------


def invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Returns the error for an invalid body from pydantic's errors: the field, and briefly what is wrong with it.

    For a union, pydantic reports errors for each alternative; only those of the best-fitting alternatives are used.
    """
    if not errors:
        return ApiError(400, "The body is not valid.", "invalid_request")
    if errors[0]["type"] == "json_invalid":
        return ApiError(
            400,
            f"The body is not JSON: {errors[0]['ctx']['error']} (at character {errors[0]['loc'][-1]})",
            "invalid_json",
        )
    if errors[0]["loc"][0] == "query":
        name = str(errors[0]["loc"][-1])
        return ApiError(400, f"{name}: {_words(errors[0]['msg'])}", "invalid_request", param=name)
    located = [(*_place(error["loc"][1:], body, missing=error["type"] == "missing"), error) for error in errors]
    first = [one for one in located if one[0][:1] == located[0][0][:1]]
    branches: dict[tuple[str, ...], list[tuple[tuple[str | int, ...], Mapping[str, Any]]]] = {}
    for path, tags, error in first:
        branches.setdefault(tags, []).append((path, error))
    fewest = min(len(branch) for branch in branches.values())
    best = [branch[0] for branch in branches.values() if len(branch) == fewest]
    place = max((path for path, _ in best), key=len)
    matching = [error for path, error in best if path == place]
    matching = [
        error for error in matching if not error["type"].endswith("_type")
    ] or matching  # the type fits, so the value is wrong
    text = " or ".join(dict.fromkeys(_words(error["msg"]) for error in matching)).replace(" or it should be ", " or ")
    param = errors[0].get("ctx", {}).get("param") or _written(place)
    code = "unsupported_parameter" if errors[0]["type"] == "unsupported_parameter" else "invalid_request"
    return ApiError(400, f"{param or 'the body'}: {text}", code, param=param)


def _place(loc: Sequence[str | int], body: Any, missing: bool) -> tuple[tuple[str | int, ...], tuple[str, ...]]:
    """Splits pydantic's location into the path in the body and the union alternatives on the way."""
    path: list[str | int] = []
    tags: list[str] = []
    for number, part in enumerate(loc):
        last = number == len(loc) - 1
        try:
            body = body[part]
        except (TypeError, LookupError):
            if not (missing and last):
                tags.append(str(part))
                continue
        path.append(part)
    return tuple(path), tuple(tags)


def _written(path: Sequence[str | int]) -> str | None:
    """Returns the path in OpenAI's notation, such as messages[0].content."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".") or None


def _words(message: str) -> str:
    for pattern, words in _WORDS:
        message = pattern.sub(words, message, count=1)
    return message
