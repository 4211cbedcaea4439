"""Builds the web UI's application and runs its server."""

from __future__ import annotations

import asyncio
import contextlib
import html
import ipaddress
import logging
import os
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import RedirectResponse

from llm_ray import apart
from llm_ray.app.jobs import recover
from llm_ray.conf.section import Paths
from llm_ray.errors import ConfError, ServeError
from llm_ray.ui.guard import Door, Guard
from llm_ray.ui.login import Link, Login
from llm_ray.ui.screens import SCREENS, Screen, Site
from llm_ray.ui.sessions import Lockout, Sessions
from llm_ray.ui.uploads import Uploads
from llm_ray.ui.users import Users, list_users, users_file

_LOG = logging.getLogger("llm_ray.ui")
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_LOOKS_FOR_WORK, _LOOKS_FOR_PROGRESS = 0.005, 1.0  # seconds; handlers do not use Gradio's progress
_SWEEP_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Settings:
    """How the UI is reached, and its limits."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 7860
    certificate: Path | None = None
    key: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    """Host names accepted in addition to this host's own."""
    allow_origins: tuple[str, ...] = ()
    """The UI's origin as browsers see it behind a proxy, such as https://llm.example.org."""
    trusted_proxy: str | None = None
    """The proxy's address, whose X-Forwarded-For and -Proto headers are trusted."""
    most_upload_bytes: int = 2 * 2**30
    address: str | None = None
    """The cluster that serves; None means this machine's own Ray."""

    @property
    def secure(self) -> bool:
        """Whether browsers reach the UI only by HTTPS, its own or a proxy's."""
        return self.certificate is not None or (
            bool(self.allow_origins) and all(url.startswith("https:") for url in self.allow_origins)
        )

    @property
    def loopback(self) -> bool:
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        return self.host == "localhost"


def serve(settings: Settings, announce: Callable[[str], None], screens: tuple[Screen, ...] = SCREENS) -> None:
    """Runs the UI until SIGINT or SIGTERM; calls `announce` with each URL to open.

    Raises ConfError if it would listen beyond loopback without users or if certificate and key are invalid, ServeError
    if the port is taken.
    """
    users = users_file(settings.home)
    local = settings.loopback and not list_users(users)
    if not settings.loopback and not list_users(users):
        raise ConfError(
            f"--host {settings.host} can be reached from other machines, but there are no users yet: create the "
            "first with llm-ray ui users add NAME --role admin. Without users the page stays on loopback"
        )
    tls = _context(settings)
    if not settings.loopback and not settings.secure:
        _LOG.warning(
            "Without --tls-cert and --tls-key, passwords travel in plain text: use this only on a network that you "
            "trust"
        )
    with _bound(settings) as listening:
        url = f"{'https' if tls else 'http'}://{_shown(settings)}:{listening.getsockname()[1]}"
        link = Link(lambda token: announce(f"{url}/login?token={token}")) if local else None
        app = create_app(settings, listening.getsockname()[1], link, screens)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=settings.trusted_proxy is not None,
            forwarded_allow_ips=settings.trusted_proxy,
            ssl_context_factory=(lambda *_: tls) if tls else None,
            timeout_graceful_shutdown=2,  # open streams end then
            ws="none",
        )
        if begun := recover(Paths.of(settings.home).runs):
            _LOG.warning(f"This machine was restarted: {', '.join(begun)} resume")
        _Server(config, app, link.renew if link else (lambda: announce(url))).run(sockets=[listening])


def create_app(settings: Settings, port: int, link: Link | None = None, screens: tuple[Screen, ...] = SCREENS) -> Guard:
    """Returns the application with Gradio mounted, behind the guard. `link` allows sign-in while there are no users."""
    import gradio as gr

    uploads = Uploads(settings.home, settings.most_upload_bytes)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.cache)  # Gradio has no other setting for it
    users = Users(users_file(settings.home))
    sessions = Sessions(users)
    tls = settings.secure
    cookie = "__Host-llm-ray" if tls else f"llm-ray-{port}"  # cookies are not separated by port
    paths = tuple(screen.path for screen in screens)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(sessions, uploads))
        try:
            yield
        finally:
            sweeping.cancel()
            uploads.close()

    app = FastAPI(title="LLM on Ray", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    # Allows only our own origin; with this middleware present, Gradio does not add its own, which allows all.
    app.add_middleware(CORSMiddleware, allow_origins=list(settings.allow_origins))
    app.include_router(Login(users, sessions, Lockout(), link, cookie, tls, paths).router)
    app.add_api_route("/", lambda: RedirectResponse(f"/{paths[0]}", status_code=303), methods=["GET", "HEAD"])
    app.add_api_route("/health", lambda: {"status": "ok"}, methods=["GET", "HEAD"])
    app.add_api_route("/gradio_api/upload", uploads.receive, methods=["POST"])
    blocks = build(Site(settings.home, uploads, settings.address), screens)
    from llm_ray.ui.theme import theme

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SSR mode is not supported")  # SSR is off
        gr.mount_gradio_app(
            app,
            blocks,
            path="/",
            auth_dependency=lambda request: request.state.visitor and request.state.visitor.name,
            allowed_paths=[],
            show_error=False,
            max_file_size=settings.most_upload_bytes,
            theme=theme(),
            css_paths=Path(__file__).parent / "frame.css",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )
    # Gradio does not count a mounted app as launched, but checks files named in requests only for a launched one.
    blocks.has_launched = True
    return Guard(app, _door(settings, port), sessions, uploads, cookie, frozenset(paths))


def build(site: Site, screens: tuple[Screen, ...]) -> gr.Blocks:  # type: ignore[name-defined]  # noqa: F821
    """Returns Gradio's page with all screens, each at its own URL. Raises TypeError for a screen that connects a
    function without a role."""
    import gradio as gr

    from llm_ray.ui.handlers import check

    blocks = gr.Blocks(title="LLM on Ray", analytics_enabled=False, delete_cache=(3600, 86400))
    for screen in screens:
        with blocks.route(screen.title, f"/{screen.path}", show_in_navbar=False):
            heading = f'<h1 id="content" tabindex="-1">{html.escape(screen.title)}</h1>'
            gr.HTML(_header(screen, screens) + heading, elem_classes="frame")
            screen.build(site)
    blocks.queue(api_open=False, max_size=256)
    # By default Gradio polls for work a thousand times a second, even with no page open: 3 % of a core.
    blocks._queue.sleep_when_free, blocks._queue.progress_update_sleep_when_free = _LOOKS_FOR_WORK, _LOOKS_FOR_PROGRESS
    check(blocks)
    return blocks


def _header(current: Screen, screens: tuple[Screen, ...]) -> str:
    def link(screen: Screen) -> str:
        here = ' aria-current="page"' if screen is current else ""
        return f'<li><a href="/{screen.path}"{here}>{html.escape(screen.title)}</a></li>'

    steps = "".join(link(screen) for screen in screens if screen.step)
    others = "".join(link(screen) for screen in screens if not screen.step)
    return (
        '<header class="frame-header"><a class="frame-skip" href="#content">Skip to the content</a><p class="name">LLM '
        "on Ray</p>"
        f'<nav aria-label="Screens"><ul class="steps">{steps}</ul><ul>{others}</ul></nav>'
        '<ul class="end"><li><a href="/logout">Sign out</a></li></ul></header>'
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, guard: Guard, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._guard, self._ready = guard, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        apart.end_all()
        self._guard.end_streams()  # otherwise uvicorn waits for them and then cancels them with a traceback
        await super().shutdown(sockets=sockets)


async def _sweep(sessions: Sessions, uploads: Uploads) -> None:
    rounds = 0
    while True:
        await asyncio.sleep(_SWEEP_EVERY)
        sessions.sweep()
        rounds += 1
        if rounds % 60 == 0:
            await asyncio.to_thread(uploads.sweep)


def _door(settings: Settings, port: int) -> Door:
    named = {name.lower() for name in settings.allow_hosts}
    own = {f"{name}:{port}" for name in _LOOPBACK_NAMES}
    if not settings.loopback:
        names = {socket.gethostname().lower(), socket.getfqdn().lower()}
        with contextlib.suppress(ValueError):
            if not ipaddress.ip_address(settings.host).is_unspecified:
                names.add(_bracketed(settings.host))
        own |= {f"{name}:{port}" for name in names}
    if port in (80, 443):  # browsers omit these ports
        own |= {name.rpartition(":")[0] for name in own}
    return Door(frozenset(named | own), frozenset(settings.allow_origins), settings.secure)


def _context(settings: Settings) -> ssl.SSLContext | None:
    if settings.certificate is None and settings.key is None:
        return None
    if settings.certificate is None or settings.key is None:
        raise ConfError("--tls-cert and --tls-key belong together: give both or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.certificate, settings.key, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        raise ConfError(
            f"--tls-cert {settings.certificate}, --tls-key {settings.key}: "
            f"{getattr(error, 'strerror', None) or error}. Both are PEM files, the key without a password"
        ) from error
    return context


@contextlib.contextmanager
def _bound(settings: Settings):  # type: ignore[no-untyped-def]
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((settings.host.strip("[]"), settings.port))
        except OSError as error:
            reason = error.strerror or error
            raise ServeError(
                f"cannot listen on {settings.host}:{settings.port}: {reason}. Choose another with --port"
            ) from error
        yield listening


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _shown(settings: Settings) -> str:
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(settings.host).is_unspecified:
            return socket.gethostname()
    return _bracketed(settings.host.strip("[]"))
