"""Settings of Ray Serve's own processes: the response if the gateway dies during an answer, and polling intervals.

Serve's HTTP proxy would close the connection without a response, which its HTTP server turns into 500. Here it becomes
503 in OpenAI's form, or an error event in a stream. Serve reads all of this from its environment:
``os.environ.update(proxy.ENVIRONMENT)`` where Ray starts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from starlette.middleware import Middleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "llm_ray.serve.gateway.proxy:middlewares",
    # Serve's default of ten times a second costs the controller 3 % of a core, and other processes as much, which
    # compute threads then lack.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # replaced after three failures; Serve's default is every 10 s
}
_LOST = {
    "error": {
        "message": "The endpoint was lost during the answer; retry.",
        "type": "server_error",
        "param": None,
        "code": "gateway_lost",
    }
}


def middlewares() -> list[Middleware]:
    """Called by Ray Serve's proxy when it starts."""
    return [Middleware(AlwaysAnswers)]


class AlwaysAnswers:
    """Completes responses the app left unfinished."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] | None = None
        whole = False

        async def watched(message: Message) -> None:
            nonlocal headers, whole
            if message["type"] == "http.response.start":
                headers = {name.lower(): value for name, value in message["headers"]}
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        await self.app(scope, receive, watched)
        body = json.dumps(_LOST).encode()
        if headers is None:
            head = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"retry-after", b"1"),
            ]
            await send({"type": "http.response.start", "status": 503, "headers": head})
            await send({"type": "http.response.body", "body": body})
        elif not whole and headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})
