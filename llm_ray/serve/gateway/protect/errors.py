"""Errors in the form of OpenAI's API.

Form: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OURS = 500


def error_type(status: int) -> str:
    """Returns OpenAI's error type for an HTTP status."""
    return "server_error" if status >= _OURS else _TYPES.get(status, "invalid_request_error")


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """Returns the error as the content of a response or of a stream's event."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def openai_error(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Returns an error response."""
    return JSONResponse(error_body(status, message, code, param), status, headers=headers)
