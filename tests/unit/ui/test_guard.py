"""Nothing of the page is reached from elsewhere, without a session, or about what is somebody else's."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from llm_ray.ui.guard import Door, Guard
from llm_ray.ui.sessions import Session, Sessions
from llm_ray.ui.uploads import Uploads
from llm_ray.ui.users import Role, Users, add_user, list_users, revoke_user

HOME = "http://127.0.0.1:7860"


async def _echo(request: Request) -> Response:
    if request.url.path == "/data":
        return HTMLResponse("<script>one()</script><script src='x.js'></script><script type=module>two()</script>")
    visitor = request.state.visitor
    return JSONResponse(
        {"who": visitor and visitor.name, "headers": dict(request.headers), "body": (await request.body()).decode()}
    )


class Site:
    def __init__(self, home: Path, kept: Path) -> None:
        self.file = home / "ui" / "users.json"
        self.file.parent.mkdir(mode=0o700)
        shutil.copy(kept, self.file)
        self.users = {user.name: user for user in list_users(self.file)}
        self.uploads = Uploads(home, 1000)
        self.sessions = Sessions(Users(self.file))
        app = Starlette(routes=[Route("/{path:path}", _echo, methods=["GET", "HEAD", "POST", "PUT", "DELETE"])])
        door = Door(frozenset({"127.0.0.1:7860", "page.example.org"}), frozenset({"https://proxy.example.org"}))
        self.open = contextlib.ExitStack()
        self.guard = Guard(app, door, self.sessions, self.uploads, "llm-ray-7860", frozenset({"data"}))

    def begin(self, name: str) -> Session:
        user = self.users[name]
        return self.sessions.begin(user.name, user.role, user.stamp)

    def client(self, name: str = "", **headers: str) -> TestClient:
        cookies = {"llm-ray-7860": self.begin(name).id} if name else {}
        client = TestClient(
            self.guard, base_url=HOME, cookies=cookies, headers={"origin": HOME, **headers}, follow_redirects=False
        )
        return self.open.enter_context(client)  # all its requests in one event loop, as in a server


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of users: their hashes are slow to make."""
    file = tmp_path_factory.mktemp("users") / "users.json"
    for name in ("alice", "bob"):
        add_user(file, name, "several words together", Role.USER)
    return file


@pytest.fixture
def site(tmp_path: Path, kept: Path) -> Iterator[Site]:
    site = Site(tmp_path, kept)
    with site.open:
        yield site
    site.uploads.close()


# Of Gradio 6.31's routes, all that hold or do something.
_ALL = [
    ("GET", "/config"), ("GET", "/config/"), ("GET", "/gradio_api/info"), ("GET", "/gradio_api/openapi.json"), ("POST", "/gradio_api/queue/join"),
    ("GET", "/gradio_api/queue/data?session_hash=p"), ("GET", "/gradio_api/queue/status"), ("POST", "/gradio_api/cancel"), ("POST", "/gradio_api/reset"),
    ("GET", "/gradio_api/heartbeat/p"), ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/upload_progress?upload_id=1"), ("GET", "/gradio_api/file=/etc/hostname"),
    ("GET", "/gradio_api/file/etc/hostname"), ("POST", "/gradio_api/run/predict"), ("POST", "/gradio_api/call/start"), ("GET", "/gradio_api/call/start/1"),
    ("POST", "/gradio_api/component_server"), ("GET", "/gradio_api/deep_link?session_hash=p"), ("GET", "/gradio_api/token"), ("GET", "/gradio_api/user"),
    ("GET", "/gradio_api/runs"), ("POST", "/gradio_api/run-history/connect"), ("GET", "/monitoring"), ("GET", "/monitoring/summary"), ("POST", "/gradio_api/vibe-edit"),
    ("GET", "/gradio_api/dev/reload"), ("GET", "/gradio_api/proxy=https://example.org"), ("GET", "/gradio_api/mcp/sse"), ("POST", "/gradio_api/process_recording"),
    ("GET", "/theme.css"), ("GET", "/assets/index.js"), ("GET", "/static/img/logo.svg"), ("GET", "/pwa_icon"), ("GET", "/data"), ("GET", "/"), ("GET", "/nothing"),
    ("GET", "/data/../config"), ("PUT", "/data"), ("DELETE", "/config"), ("GET", "/login/../config"), ("GET", "/loginx"), ("GET", "/health/x"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), _ALL)
def test_without_a_session_nothing_answers(site: Site, method: str, path: str) -> None:
    answer = site.client().request(method, path)
    if answer.status_code == 303:
        assert answer.headers["location"].startswith("/login") and path in ("/", "/data")
    else:
        assert answer.status_code == 401
    assert "who" not in answer.text


@pytest.mark.parametrize("path", ["/login", "/health", "/manifest.json"])
def test_what_is_open(site: Site, path: str) -> None:
    assert site.client().get(path).json()["who"] is None


def test_with_a_session_the_page_answers_and_knows_who_asks(site: Site) -> None:
    alice = site.client("alice")
    assert alice.get("/config").json()["who"] == "alice"
    assert alice.post("/gradio_api/queue/join", json={"session_hash": "page"}).json()["who"] == "alice"


_USED = {
    "/config", "/config/", "/gradio_api/queue/join", "/gradio_api/queue/data?session_hash=p", "/gradio_api/queue/status", "/gradio_api/cancel", "/gradio_api/reset",
    "/gradio_api/heartbeat/p", "/gradio_api/upload", "/gradio_api/upload_progress?upload_id=1", "/theme.css", "/assets/index.js", "/static/img/logo.svg", "/data", "/",
    "/data/../config", "/login/../config",
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path"), [(method, path) for method, path in _ALL if path not in _USED or method in ("PUT", "DELETE")]
)
def test_what_the_page_does_not_need_is_not_there(site: Site, method: str, path: str) -> None:
    answer = site.client("alice").request(method, path, json={"session_hash": "p"})
    assert answer.status_code in (403, 404)
    assert "who" not in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example.org", "127.0.0.1:7861", "127.0.0.1", "", "127.0.0.1:7860.evil.org", "evil.org:7860"]
)
@pytest.mark.parametrize("path", ["/login", "/config", "/gradio_api/queue/data?session_hash=p", "/gradio_api/upload"])
def test_a_foreign_host_is_refused_everywhere(site: Site, host: str, path: str) -> None:
    answer = site.client("alice", host=host).request("POST" if "upload" in path else "GET", path)
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example.org", "null", "http://127.0.0.1:7861", "https://127.0.0.1:7860", HOME + ".evil.org"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/login"),
        ("POST", "/logout"),
        ("GET", "/config"),
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/data?session_hash=p"),
        ("POST", "/gradio_api/upload"),
        ("OPTIONS", "/gradio_api/upload"),
    ],
)
def test_a_foreign_origin_is_refused_everywhere(site: Site, origin: str, method: str, path: str) -> None:
    answer = site.client("alice", origin=origin).request(method, path)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_what_changes_something_names_its_origin(site: Site) -> None:
    bare = TestClient(site.guard, base_url=HOME, cookies={"llm-ray-7860": site.begin("alice").id})
    assert bare.post("/gradio_api/queue/join", json={"session_hash": "p"}).status_code == 403
    assert bare.get("/config").status_code == 200


def test_allowed_names_and_origins(site: Site) -> None:
    named = site.client("alice", host="page.example.org", origin="http://page.example.org")
    assert named.get("/config").status_code == 200
    proxied = site.client("alice", host="proxy.example.org", origin="https://proxy.example.org")
    assert proxied.post("/gradio_api/cancel", json={"session_hash": "p"}).status_code == 200


def test_websockets_are_closed(site: Site) -> None:
    with pytest.raises(WebSocketDisconnect), site.client("alice").websocket_connect("/gradio_api/queue/join"):
        pass


def test_headers_that_claim_another_host_or_client_do_not_arrive(site: Site) -> None:
    forged = {
        "X-Forwarded-Host": "evil.org",
        "Forwarded": "for=1.2.3.4",
        "X-Direct-Url": "http://evil.org",
        "X-Gradio-User": "admin",
    }
    headers = site.client("alice").get("/config", headers=forged).json()["headers"]
    assert not {"x-forwarded-host", "forwarded", "x-direct-url", "x-gradio-user"} & set(headers)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/gradio_api/queue/data?session_hash=hers", None),
        ("GET", "/gradio_api/queue/data?session_hash=x&session_hash=hers", None),
        ("GET", "/gradio_api/heartbeat/hers", None),
        ("POST", "/gradio_api/queue/join", {"session_hash": "hers", "fn_index": 0, "data": []}),
        ("POST", "/gradio_api/cancel", {"session_hash": "hers", "fn_index": 0, "event_id": "1"}),
    ],
)
def test_somebody_elses_open_page_is_out_of_reach(site: Site, method: str, path: str, body: Any) -> None:
    alice, bob = site.client("alice"), site.client("bob")
    assert alice.post("/gradio_api/queue/join", json={"session_hash": "hers"}).status_code == 200
    assert bob.request(method, path, json=body).status_code == 403
    assert alice.request(method, path, json=body).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"session_hash": null}', b'{"session_hash": 1}', b"{", b"\xff", b"[" * 100_000]
)
def test_a_call_that_names_no_page_is_refused(site: Site, body: bytes) -> None:
    assert site.client("alice").post("/gradio_api/queue/join", content=body).status_code in (400, 403)


def _sent(site: Site, name: str) -> Path:
    file = site.uploads._folder(name) / "1" / "2" / "rows.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    return file


def test_files_are_their_senders(site: Site) -> None:
    file = _sent(site, "alice")
    answer = site.uploads.cache / "0123" / "conf.yaml"
    answer.parent.mkdir()
    answer.write_text("name: x")
    secret = site.file
    alice, bob = site.client("alice"), site.client("bob")

    def status(client: TestClient, path: str, **more: object) -> set[int]:
        call = {"session_hash": client.cookies["llm-ray-7860"], "data": [[{"x": {"path": path, **more}}]]}
        return {
            client.get(f"/gradio_api/file={path}").status_code,
            client.post("/gradio_api/queue/join", json=call).status_code,
        }

    assert status(alice, str(file)) == {200}
    assert status(bob, str(file)) == {403}
    assert status(alice, str(answer)) == {200}
    sideways = [
        str(secret),
        f"{file.parent}/../../../../../users.json",
        "users.json",
        "http://example.org/x",
        "/etc/hostname",
    ]
    (site.uploads.cache / "link").symlink_to(secret)
    for path in [*sideways, str(site.uploads.cache / "link")]:
        assert status(alice, path) == {403}, path
    assert (
        alice.post("/gradio_api/queue/join", json={"session_hash": "n", "data": [{"path": f"{file}\0"}]}).status_code
        == 403
    )


@pytest.mark.parametrize(
    ("url", "status"),
    [("http://example.org/x", 403), ("file:///etc/hostname", 403), (HOME + "/gradio_api/file=/x", 200), ("/x", 200)],
)
def test_no_url_of_elsewhere_is_named_to_gradio(site: Site, url: str, status: int) -> None:
    call = {"session_hash": "p", "data": [{"path": None, "url": url, "meta": {"_type": "gradio.FileData"}}]}
    assert site.client("alice").post("/gradio_api/queue/join", json=call).status_code == status


@pytest.mark.parametrize(("path", "size"), [("/gradio_api/queue/join", 9 * 2**20), ("/login", 20 * 2**10)])
def test_what_is_too_large_is_refused(site: Site, path: str, size: int) -> None:
    assert site.client("alice").post(path, content=b"x" * size).status_code == 413


def test_a_page_runs_the_scripts_it_came_with_and_no_others(site: Site) -> None:
    answer = site.client("alice").get("/data")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in (b"one()", b"two()")
    ]
    assert policy["script-src"].split() == ["'self'", "'unsafe-eval'", *hashes]
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "two()" in answer.text


@pytest.mark.parametrize("path", ["/login", "/config", "/data", "/nothing"])
def test_every_answer_has_the_headers(site: Site, path: str) -> None:
    for client in (site.client("alice"), site.client(), site.client("alice", host="evil.org")):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


async def _revoked_during(site: Site, app: ASGIApp, path: str, sent: list[Message], busy: anyio.Event) -> None:
    """Ask for `path`, and end the session once `busy` is set."""
    session = site.begin("alice")
    guard = Guard(app, site.guard._door, site.sessions, site.uploads, "c", frozenset({"data"}))
    scope: Scope = {
        "type": "http", "method": "GET", "scheme": "http", "path": path, "query_string": b"session_hash=p", "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"127.0.0.1:7860"), (b"cookie", f"c={session.id}".encode())],
    }  # fmt: skip

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)
        if message.get("body"):
            busy.set()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(guard, scope, receive, send)
            await busy.wait()
            assert session.requests == 1
            revoke_user(site.file, "alice")
            site.sessions.sweep()
    assert session.requests == 0


def test_an_open_stream_ends_with_its_session(site: Site) -> None:
    sent: list[Message] = []

    async def endless() -> AsyncIterator[bytes]:
        yield b"one"
        await anyio.sleep_forever()

    async def run() -> None:
        stream = StreamingResponse(endless(), media_type="text/event-stream")
        await _revoked_during(site, stream, "/gradio_api/queue/data", sent, anyio.Event())

    anyio.run(run)
    bodies = [
        (message["body"], message.get("more_body", False))
        for message in sent
        if message["type"] == "http.response.body"
    ]
    assert bodies == [(b"one", True), (b"", False)]


@pytest.mark.parametrize(("path", "status"), [("/gradio_api/queue/data", 401), ("/data", 303)])
def test_an_answer_that_has_not_begun_when_its_session_ends_is_a_refusal(site: Site, path: str, status: int) -> None:
    sent: list[Message] = []

    async def run() -> None:
        busy = anyio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            busy.set()
            await anyio.sleep_forever()

        await _revoked_during(site, app, path, sent, busy)

    anyio.run(run)
    assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [status]
