"""Errors between a client and an endpoint, with messages that say what to do.

Each error has a ``kind``, by which failures are counted ("status 503", "timeout", …), and says whether it is ``fatal``:
the next request would end the same way.
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
"""Characters of a foreign answer that an error shows."""


class Failed(ServeError):
    """A request that brought no whole answer."""

    kind = "broken"
    fatal = False


class Unreachable(Failed):
    """No connection: nothing listens, the host is not known, or TLS failed."""

    kind = "unreachable"
    fatal = True


class Broken(Failed):
    """The connection ended, or what came is not what was agreed on."""


class TimedOut(Failed):
    """No whole answer within the time given."""

    kind = "timeout"


class Refused(Failed):
    """The endpoint answered with an error. `retry_after` is in seconds, None when it does not say."""

    def __init__(self, message: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.kind = f"status {status}"
        self.fatal = status in (401, 403, 404, 405)


def refused(endpoint: Endpoint, status: int, headers: Mapping[str, str], body: str) -> Refused:
    """The error for an answer with `status` (4xx or 5xx); `headers` compare without case."""
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
    """The error for an exception of an HTTP library (httpx, aiohttp, the openai SDK), told by what lies under it."""
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
    """The error and what it came of, innermost last."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for member in error.exceptions:
                yield from _causes(member)
        error = error.__cause__ or error.__context__


def _message(body: str) -> str:
    """The message of an error in OpenAI's form, or the beginning of another answer."""
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
    """Seconds of a Retry-After header, which is a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
