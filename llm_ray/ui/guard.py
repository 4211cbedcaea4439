"""ASGI middleware in front of every path: checks Host and Origin, session, allowed Gradio routes and sizes, and sets
headers.

Gradio has some fifty routes, of which the UI needs a dozen. Everything not listed here is blocked: Gradio's own login
and tokens, API by name, monitoring, run history, deep links, proxies, MCP.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_ray.ui.sessions import Session, Sessions
from llm_ray.ui.uploads import Uploads

_LOG = logging.getLogger("llm_ray.ui")
API = "/gradio_api"
_READ = ("GET", "HEAD")
# Gradio routes used by its browser side. Screens have their own paths.
_ROUTES = {
    "GET": re.compile(
        r"/(config|theme\.css|assets/.+|static/.+|svelte/.+|favicon\.ico"
        r"|gradio_api/(queue/data|queue/status|upload_progress|startup-events|app_id|theme\.css|heartbeat/[\w-]+|file=.+))/?"
    ),
    "POST": re.compile(rf"{API}/(queue/join|cancel|reset|upload)/?"),
}
_OURS = re.compile(r"/(login|logout)?")
_OPEN = re.compile(r"/login|/health|/manifest\.json")  # need no session; browsers request a manifest without cookies
_MOST_JSON, _MOST_FORM = 8 * 2**20, 16 * 2**10  # bytes
_BODY_SECONDS = 30.0
# Headers that would make Gradio or a handler believe in another host, client or session.
_FORGED = re.compile(
    rb"x-forwarded-.*|forwarded|x-real-ip|x-direct-url|x-gradio-.*|x-ip-token|x-original-.*|x-rewrite-url"
)
_FORGED_OR_PACKED = re.compile(_FORGED.pattern + rb"|accept-encoding")  # compressed pages cannot be scanned for scripts
_SCRIPT = re.compile(r"<script(?:\s[^>]*)?>(.*?)</script>", re.S)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer, browsers send forms with the Origin `null`
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}


@dataclass(frozen=True)
class Door:
    """Where the UI can be reached."""

    hosts: frozenset[str]
    """Accepted Host headers; a name without a port accepts any port."""
    origins: frozenset[str] = frozenset()
    """Accepted origins besides the request's own scheme and host, such as a proxy's https://llm.example.org."""
    tls: bool = False

    def knows(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        return host in self.hosts or name in self.hosts or any(o.partition("://")[2] == host for o in self.origins)


class Guard:
    """Passes on requests with a session, within what they may access. Adds a content security policy that lists the
    page's scripts."""

    def __init__(
        self, app: ASGIApp, door: Door, sessions: Sessions, uploads: Uploads, cookie: str, screens: frozenset[str]
    ) -> None:
        self._app, self._door, self._sessions, self._uploads = app, door, sessions, uploads
        self._cookie, self._screens = cookie, screens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # the UI uses none, so none are allowed
            await send({"type": "websocket.close", "code": 1008})
            return
        unwanted = _FORGED_OR_PACKED if scope["path"].strip("/") in self._screens else _FORGED
        scope = {
            **scope,
            "headers": [(name, value) for name, value in scope["headers"] if not unwanted.fullmatch(name)],
        }
        sending = _Sending(send)
        send = self._headed(scope, sending)
        refusal = self._foreign(scope)
        if refusal is None:
            session = self._session(scope)
            scope["state"] = {**scope.get("state", {}), "session": session, "visitor": session and session.visitor}
            if session is None:
                refusal = None if _OPEN.fullmatch(scope["path"]) else self._stranger(scope)
            else:
                refusal = self._out_of_bounds(scope, session)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if scope["method"] == "POST" and scope["path"].rstrip("/") != f"{API}/upload":
            limit = _MOST_JSON if scope["path"].startswith(API) else _MOST_FORM
            receive, refusal = await self._body(scope, receive, limit)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        if session is None:
            await self._app(scope, receive, send)
        else:
            with self._sessions.request(session):
                await self._until_ended(session, scope, receive, send, sending)

    def end_streams(self) -> None:
        """Ends all sessions and with them the running responses; called before the server shuts down."""
        self._sessions.end_all()

    def _foreign(self, scope: Scope) -> Response | None:
        """Returns the refusal of a request that may come from another site's page or used an unknown host name."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if not self._door.knows(host) or len(headers.getlist("host")) != 1:
            _LOG.warning(f"refused: Host {host!r} from {_client(scope)}")
            return PlainTextResponse(
                "This page is not available under this name. Its operator can add it: llm-ray ui --allow-host NAME\n",
                status_code=421,
            )
        allowed = origin is None and scope["method"] in _READ
        if not allowed and origin not in {f"{scope['scheme']}://{host}", *self._door.origins}:
            _LOG.warning(f"refused: Origin {origin!r} from {_client(scope)}")
            return PlainTextResponse("Requests from other sites' pages are not answered.\n", status_code=403)
        return None

    def _session(self, scope: Scope) -> Session | None:
        values = [cookie_parser(line) for line in Headers(scope=scope).getlist("cookie")]
        found = next((cookies[self._cookie] for cookies in values if self._cookie in cookies), None)
        return self._sessions.find(found) if found else None

    def _stranger(self, scope: Scope) -> Response:
        path = scope["path"]
        if scope["method"] in _READ and (path == "/" or path.strip("/") in self._screens):
            asked = scope["query_string"].decode("latin-1")  # keeps the run or model named in a shared link
            query = f"?next={quote(f'{path}?{asked}' if asked else path)}" if path != "/" else ""
            return RedirectResponse(f"/login{query}", status_code=303)
        return JSONResponse({"detail": "Sign in first."}, status_code=401)

    def _out_of_bounds(self, scope: Scope, session: Session) -> Response | None:
        """Returns the refusal for a signed-in visitor's request to an unknown route or to another visitor's data."""
        path, method = scope["path"], "GET" if scope["method"] == "HEAD" else scope["method"]
        if _OURS.fullmatch(path) or _OPEN.fullmatch(path) or (method == "GET" and path.strip("/") in self._screens):
            return None
        known = _ROUTES.get(method)
        if known is None or not known.fullmatch(path):
            return JSONResponse({"detail": "Not found."}, status_code=404)
        page = None
        if path.startswith(f"{API}/heartbeat/"):
            page = path.rstrip("/").rpartition("/")[2]
        elif query := parse_qs(scope["query_string"].decode("latin-1")).get("session_hash"):
            page = query[-1]
        if page is not None and not self._sessions.claim(page, session):
            return _not_yours()
        if path.startswith(f"{API}/file=") and not self._uploads.may_read(session.visitor.name, path.partition("=")[2]):
            return _not_yours()
        return None

    async def _body(self, scope: Scope, receive: Receive, most: int) -> tuple[Receive, Response | None]:
        """Reads and checks the request's body: at most `most` bytes, and only pages and files of this session."""
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more and len(body) <= most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return receive, Response(status_code=499)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            return receive, PlainTextResponse(
                "The request did not arrive in time.\n", status_code=408, headers={"connection": "close"}
            )
        if len(body) > most:
            return receive, PlainTextResponse(
                "The request is too large.\n", status_code=413, headers={"connection": "close"}
            )
        session: Session | None = scope["state"]["session"]
        if session is not None and scope["path"].startswith(API):
            try:
                content = json.loads(body)
            except (ValueError, RecursionError):
                return receive, JSONResponse({"detail": "The request is not JSON."}, status_code=400)
            refusal = self._look_into(content, session)
            if refusal is not None:
                return receive, refusal
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again, None

    def _look_into(self, content: Any, session: Session) -> Response | None:
        page = content.get("session_hash") if isinstance(content, dict) else None
        if not isinstance(page, str) or not self._sessions.claim(page, session):
            return _not_yours()
        # A mounted Gradio would copy any named file of this machine and fetch any URL.
        for value in _files(content):
            path, url = value.get("path"), value.get("url")
            if path is not None and not (isinstance(path, str) and self._uploads.may_read(session.visitor.name, path)):
                return _not_yours()
            if url is not None and not (isinstance(url, str) and self._is_here(url)):
                return _not_yours()
        return None

    def _is_here(self, url: str) -> bool:
        scheme, separator, rest = url.partition("://")
        return not separator or (scheme in ("http", "https") and self._door.knows(rest.partition("/")[0].lower()))

    async def _until_ended(
        self, session: Session, scope: Scope, receive: Receive, send: Send, sending: _Sending
    ) -> None:
        """Runs the application until the session ends. A response in progress is then cut off; one that has not begun
        becomes a refusal."""
        answer = asyncio.ensure_future(_awaited(self._app(scope, receive, send)))
        ended = asyncio.ensure_future(session.ended.wait())
        try:
            await asyncio.wait({answer, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not answer.done() and scope["path"] != "/logout":
                answer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answer
        if answer.cancelled() and not sending.begun:
            await self._stranger(scope)(scope, receive, send)
        elif answer.cancelled() and sending.open:
            await send({"type": "http.response.body", "body": b""})

    def _headed(self, scope: Scope, send: Send) -> Send:
        """Returns `send` with the headers of every response. HTML pages are buffered, since a header lists their
        scripts."""
        path = scope["path"]
        immutable = path.startswith(("/assets/", "/static/"))
        page: list[Message] = []

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                page.clear()  # remains of a cancelled response
                headers = MutableHeaders(raw=list(message["headers"]))
                for name, value in _HEADERS.items():
                    headers[name] = value
                if self._door.tls:
                    headers["strict-transport-security"] = "max-age=31536000"
                if not immutable:
                    headers["cache-control"] = "no-store"
                elif path.startswith("/assets/") and message["status"] == 200:  # file names contain hashes
                    headers["cache-control"] = "private, max-age=31536000, immutable"
                message = {**message, "headers": headers.raw}
                if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                    page.append(message)
                    return
                headers["content-security-policy"] = _policy([])
                message["headers"] = headers.raw
            elif page:
                page.append(message)
                if message.get("more_body", False):
                    return
                html = b"".join(part.get("body", b"") for part in page[1:])
                start = page[0]
                MutableHeaders(raw=start["headers"])["content-security-policy"] = _policy(
                    _SCRIPT.findall(html.decode(errors="replace"))
                )
                page.clear()
                await send(start)
                message = {"type": "http.response.body", "body": html}
            await send(message)

        return headed


class _Sending:
    """Wraps `send` and tracks whether a response has `begun` and whether it is `open`: unfinished and without a
    declared length."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.open = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.open = True, "content-length" not in MutableHeaders(raw=message["headers"])
        elif not message.get("more_body", False):
            self.open = False
        await self._send(message)


def _policy(scripts: list[str]) -> str:
    """Returns the content security policy of a page with these inline scripts: no other scripts run, and no other hosts
    are contacted.

    Gradio's HTML and plots (Vega) need eval. Inline event handlers are blocked, because Gradio's chat parses a model's
    answer before sanitizing it, so the answer could otherwise take over the page.
    """
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
        if script.strip()
    ]
    parts = {
        "default-src": "'none'",
        "script-src": " ".join(["'self'", "'unsafe-eval'", *hashes]),
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "media-src": "'self' data: blob:",
        "connect-src": "'self'",
        "worker-src": "'self' blob:",
        "manifest-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'self'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def _files(value: Any) -> Iterator[dict[str, Any]]:
    """Yields everything in a request that Gradio would treat as a file."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value or "url" in value:
                yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _not_yours() -> Response:
    return JSONResponse({"detail": "This is not yours."}, status_code=403)


def _client(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else "an unknown address"


async def _awaited(work: Any) -> None:
    await work
