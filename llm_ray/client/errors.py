"""Errors between a client and an endpoint, with messages that say what to do.

Each error has a ``kind``, by which failures are counted ("status 503", "timeout", …), and a flag ``fatal``: the next
request would fail the same way.
"""

from __future__ import annotations

import email.utils
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping

from llm_ray.client.endpoint import Endpoint
from llm_ray.errors import ServeError

SHOWN = 300
"""Maximum characters of a server's response that an error quotes."""


class Failed(ServeError):
    """A request without a complete answer."""

    kind = "broken"
    fatal = False


class Unreachable(Failed):
    """No connection: nothing listens, the host is unknown, or TLS failed."""

    kind = "unreachable"
    fatal = True


class Broken(Failed):
    """The connection was lost, or the response is malformed."""


class TimedOut(Failed):
    """The answer was not complete within the timeout."""

    kind = "timeout"


class Refused(Failed):
    """The endpoint answered with an error. `retry_after` is in seconds, None if not given."""

    def __init__(self, message: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.kind = f"status {status}"
        self.fatal = status in (401, 403, 404, 405)


def refused(endpoint: Endpoint, status: int, headers: Mapping[str, str], body: str) -> Refused:
    """Returns the error for a response with `status` (4xx or 5xx). `headers` must be case-insensitive."""
    reason = _message(body)
    key, url = endpoint.key, endpoint.url
    if status == 401 and key is None:
        message = f"{url} requires an API key (401: {reason}): set LLM_RAY_API_KEY, or use --api-key-file FILE"
    elif status == 401 and key is not None:
        message = (
            f"{url} rejects the API key from {key.source} (401: {reason}): is it revoked, or for another endpoint?"
        )
    elif status == 403:
        message = (
            f"{url}: {f'the API key of {key.source}' if key else 'a request without an API key'} is not allowed to "
            f"do this (403: {reason})"
        )
    elif status == 404:
        message = f"{url}: not found (404: {reason})"
    elif status == 429:
        message = (
            f"{url} is busy, or the API key's limit is reached (429: {reason}): send fewer requests at once, or "
            "retry later"
        )
    elif status < 500:
        message = f"{url} refused the request ({status}: {reason})"
    else:
        message = f"{url} failed ({status}: {reason}): see `llm-ray serve status` and `llm-ray serve logs NAME`"
    return Refused(message, status, _retry_after(headers))


def failed(endpoint: Endpoint, error: BaseException, timeout: float) -> Failed:
    """Returns the error for an exception of an HTTP library (httpx, aiohttp, the openai SDK), classified by its
    causes."""
    url = endpoint.url
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ConnectionRefusedError):
            return Unreachable(
                f"nothing listens at {url}: is the model deployed (`llm-ray serve status`), and is the port correct?"
            )
        if isinstance(cause, socket.gaierror):
            return Unreachable(f"the host of {url} is unknown ({cause.strerror})")
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Unreachable(
                f"the certificate of {url} is not trusted ({cause.verify_message}): set SSL_CERT_FILE to your CA's file"
            )
        if isinstance(cause, ssl.SSLError):
            return Unreachable(
                f"no TLS connection to {url} could be negotiated ({cause.reason}): is it http:// rather than https://?"
            )
    if any("ConnectTimeout" in type(cause).__name__ for cause in causes):
        return Unreachable(f"{url} cannot be reached: the host accepts no connection")
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes):
        return TimedOut(f"{url} did not complete the answer within {timeout:g} s (--timeout)")
    if any(isinstance(cause, ValueError) for cause in causes):
        return Broken(f"{url} did not answer with JSON ({_short(str(error))}): is this the right address?")
    reason = _short(str(causes[-1])) or type(causes[-1]).__name__
    return Broken(f"the connection to {url} was lost before the answer was complete ({reason})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and its causes, innermost last."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for member in error.exceptions:
                yield from _causes(member)
        error = error.__cause__ or error.__context__


def _message(body: str) -> str:
    """Returns the message of an OpenAI error, or the beginning of any other body."""
    try:
        value = json.loads(body)
    except ValueError:
        return _short(body) or "no reason given"
    error = value.get("error", value) if isinstance(value, dict) else value
    message = error.get("message", error.get("detail", body)) if isinstance(error, dict) else error
    return _short(str(message)) or "no reason given"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[:SHOWN] + "…"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds of a Retry-After header, which is a number or a date; None if absent or malformed."""
    value = headers.get("retry-after")
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
