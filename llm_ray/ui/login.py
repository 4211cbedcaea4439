"""Sign-in and sign-out pages, without scripts."""

from __future__ import annotations

import hmac
import html
import secrets
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from llm_ray.ui.sessions import ABSOLUTE, Lockout, Session, Sessions
from llm_ray.ui.users import LOCAL, Role, Users

_FORM_SECONDS = 3600
_STYLE = (Path(__file__).parent / "login.css").read_text(encoding="utf-8")


class Link:
    """A one-time sign-in link, printed to the terminal; used on loopback only, while there are no users."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._token = ""

    def renew(self) -> None:
        """Creates a new secret and prints its link; the previous one becomes invalid."""
        self._token = secrets.token_urlsafe(32)
        self._announce(self._token)

    def use(self, token: str) -> bool:
        """Returns whether `token` is the secret; if so, it is replaced."""
        if not self._token or not hmac.compare_digest(token.encode(), self._token.encode()):
            return False
        self.renew()
        return True


class Login:
    """The sign-in and sign-out routes. `link` is None if only users may sign in."""

    def __init__(
        self,
        users: Users,
        sessions: Sessions,
        lockout: Lockout,
        link: Link | None,
        cookie: str,
        tls: bool,
        screens: tuple[str, ...],
    ) -> None:
        self._users, self._sessions, self._lockout, self._link = users, sessions, lockout, link
        self._cookie, self._tls, self._screens = cookie, tls, screens
        self._hashing = anyio.CapacityLimiter(2)  # further requests wait without blocking a thread
        self.router = APIRouter()
        self.router.add_api_route("/login", self._show, methods=["GET", "HEAD"], response_class=HTMLResponse)
        self.router.add_api_route("/login", self._sign_in, methods=["POST"], response_class=HTMLResponse)
        self.router.add_api_route("/logout", self._ask_out, methods=["GET", "HEAD"], response_class=HTMLResponse)
        self.router.add_api_route("/logout", self._sign_out, methods=["POST"], response_class=HTMLResponse)

    def _show(self, request: Request) -> Response:
        if request.state.session is not None:
            return RedirectResponse(self._next(request.query_params.get("next", "")), status_code=303)
        return self._form(next=request.query_params.get("next", ""), token=request.query_params.get("token", ""))

    async def _sign_in(self, request: Request) -> Response:
        sent = await request.form()
        form = {name: value for name, value in sent.items() if isinstance(value, str)}
        name, password, token, next = (form.get(field, "") for field in ("name", "password", "token", "next"))
        kept = request.cookies.get(self._form_cookie, "")
        if not kept or not hmac.compare_digest(kept.encode(), form.get("csrf", "").encode()):
            return self._form("This form has expired: try again.", 403, next=next, name=name, token=token)
        client = request.client.host if request.client else ""
        session: Session | None = None
        if token:
            if self._link and not self._users.any() and self._link.use(token):
                session = self._sessions.begin(LOCAL, Role.ADMIN, "")
            message = "This link has already been used. llm-ray ui has printed a new one."
        else:
            if wait := self._lockout.attempt(name, client):
                text = f"Too many wrong passwords: try again in {wait} seconds."
                return self._form(text, 429, {"retry-after": str(wait)}, next=next, name=name)
            user = await anyio.to_thread.run_sync(self._users.check, name, password, limiter=self._hashing)
            if user:
                self._lockout.succeeded(name, client)
                session = self._sessions.begin(user.name, user.role, user.stamp)
            message = "Wrong name or password."
        if session is None:
            return self._form(message, 401, next=next, name=name)
        if request.state.session is not None:
            self._sessions.end(request.state.session)
        answer = RedirectResponse(self._next(next), status_code=303)
        self._set(answer, self._cookie, session.id, ABSOLUTE)
        answer.delete_cookie(self._form_cookie, path="/", secure=self._tls, httponly=True, samesite="strict")
        return answer

    def _ask_out(self, request: Request) -> Response:
        session: Session = request.state.session
        visitor = session.visitor
        return _page(
            "Sign out",
            f"<p>You are signed in as <b>{html.escape(visitor.name)}</b>, role {visitor.role}.</p>"
            f'<form method="post" action="/logout"><input type="hidden" name="csrf" value="{session.csrf}">'
            '<button type="submit">Sign out</button></form><p><a href="/">Back to the page</a></p>',
        )

    async def _sign_out(self, request: Request) -> Response:
        session: Session = request.state.session
        sent = (await request.form()).get("csrf", "")
        if not isinstance(sent, str) or not hmac.compare_digest(sent.encode(), session.csrf.encode()):
            return self._ask_out(request)
        self._sessions.end(session)
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(self._cookie, path="/", secure=self._tls, httponly=True, samesite="strict")
        return answer

    def _form(
        self,
        problem: str = "",
        status: int = 200,
        headers: dict[str, str] | None = None,
        *,
        next: str,
        name: str = "",
        token: str = "",
    ) -> Response:
        secret = secrets.token_urlsafe(32)
        hidden = {"csrf": secret, "next": next, "token": token}
        fields = "".join(
            f'<input type="hidden" name="{key}" value="{html.escape(value)}">' for key, value in hidden.items() if value
        )
        if token and self._link and not self._users.any():
            asked = "<p>You opened the link that <code>llm-ray ui</code> printed.</p>"
        elif self._link and not self._users.any():
            asked, fields = (
                "<p>There are no users yet: open the link that <code>llm-ray ui</code> printed on its host.</p>",
                "",
            )
        else:
            asked = (
                f'<label for="name">Name</label><input id="name" name="name" value="{html.escape(name)}" '
                'autocomplete="username" autocapitalize="none" required><label for="password">Password</label><input '
                'id="password" name="password" type="password" autocomplete="current-password" required>'
            )
        alert = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
        button = '<button type="submit">Sign in</button>' if fields else ""
        page = _page(
            "Sign in", f'{alert}<form method="post" action="/login">{fields}{asked}{button}</form>', status, headers
        )
        self._set(page, self._form_cookie, secret, _FORM_SECONDS)
        return page

    def _next(self, path: str) -> str:
        """Returns where to go after sign-in: always a screen, whatever the link contains."""
        screen, mark, query = path.partition("?")
        return (
            f"/{screen.strip('/')}{mark}{query}"
            if screen.startswith("/") and screen.strip("/") in self._screens
            else "/"
        )

    @property
    def _form_cookie(self) -> str:
        return f"{self._cookie}-form"

    def _set(self, answer: Response, name: str, value: str, seconds: float) -> None:
        answer.set_cookie(
            name, value, max_age=int(seconds), path="/", secure=self._tls, httponly=True, samesite="strict"
        )


def _page(title: str, body: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return HTMLResponse(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title} - LLM on Ray</title><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{body}</main></body></html>",
        status_code=status,
        headers=headers,
    )
