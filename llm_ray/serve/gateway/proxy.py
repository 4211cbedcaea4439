"""Settings of Ray Serve's own processes: the error a client gets when the gateway dies during an answer, and polling
intervals.

Serve's HTTP proxy would break off without an answer, which its HTTP server turns into 500. Here it is 503 in OpenAI's
form, or an error event in a stream. Serve takes all this from its environment: ``os.environ.update(proxy.ENVIRONMENT)``
where Ray starts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from starlette.middleware import Middleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "llm_ray.serve.gateway.proxy:middlewares",
    # Ten times a second, as Serve comes, is 3 % of a core for the controller, and as much for others; a thread that
    # computes has it less.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # at the third failure it is replaced; every 10 s as Serve comes
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
    """Ends what the app before it has not ended."""

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
