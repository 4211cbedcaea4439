"""Every function that the page connects asks for a role, of who really calls: over HTTP, past what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from starlette.testclient import TestClient

from llm_ray.errors import RunError
from llm_ray.ui.handlers import check, handler, on
from llm_ray.ui.screens import SCREENS, Screen, Site
from llm_ray.ui.server import Settings, build, create_app
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.uploads import Uploads
from llm_ray.ui.users import Role, add_user, revoke_user

HOME = "http://127.0.0.1:7860"
called: list[tuple[str, str]] = []


def _made(least: Role) -> Any:
    @handler(least)
    def call(visitor: Visitor, text: str) -> str:
        called.append((least, visitor.name))
        return f"{visitor.name} ({visitor.role}): {text}"

    return call


@handler(Role.VIEWER)
def streamed(visitor: Visitor, text: str) -> Iterator[str]:
    called.append(("stream", visitor.name))
    for end in range(1, len(text) + 1):
        yield text[:end]


@handler(Role.VIEWER)
def failing(visitor: Visitor, text: str) -> str:
    if text == "ours":
        raise RunError("runs/<b>x</b> is not there")
    raise ValueError("a secret of the inside")


@handler(Role.VIEWER)
def selected(visitor: Visitor, text: str, event: gr.SelectData) -> str:
    return f"{text} {event.index}"


def _screen(site: Site) -> None:
    text, answer, button = gr.Textbox(label="Text"), gr.Textbox(label="Answer"), gr.Button("Call")
    for call in (*(_made(role) for role in Role), streamed, failing):
        on(button.click, call, inputs=text, outputs=answer)
    on(answer.select, selected, inputs=text, outputs=answer)


CALLS = {Role.VIEWER: 0, Role.USER: 1, Role.ADMIN: 2, "stream": 3, "fail": 4, "select": 5}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for role in Role:
        add_user(home / "ui" / "users.json", f"a-{role}", "several words together", role)
    return home


@pytest.fixture(scope="module")
def people(home: Path) -> Iterator[dict[str, TestClient]]:
    app = create_app(Settings(home), 7860, screens=(Screen("calls", "Calls", _screen), *SCREENS))
    with TestClient(app, base_url=HOME, headers={"origin": HOME}, follow_redirects=False) as first:

        def signed_in(name: str) -> TestClient:
            client = TestClient(app, base_url=HOME, headers={"origin": HOME}, follow_redirects=False)
            client.portal = first.portal
            form = re.search(r'name="csrf" value="([^"]+)"', client.get("/login").text)
            assert form
            sent = {"name": name, "password": "several words together", "csrf": form[1]}
            assert client.post("/login", data=sent).headers["location"] == "/"
            return client

        yield {role: signed_in(f"a-{role}") for role in Role}


def _call(client: TestClient, index: int, page: str, *data: object, **more: object) -> dict[str, Any]:
    """The end of a call, as a browser makes it."""
    sent = {"fn_index": index, "session_hash": page, "data": list(data), **more}
    answer = client.post("/gradio_api/queue/join", json=sent)
    if answer.status_code != 200:
        return {"success": False, "output": {"error": answer.text}}
    events = client.get(f"/gradio_api/queue/data?session_hash={page}").text
    told = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
    return next(event for event in told if event["msg"] == "process_completed")


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("least", list(Role))
def test_a_handler_runs_for_its_role_and_those_above(people: dict[str, TestClient], role: Role, least: Role) -> None:
    called.clear()
    end = _call(
        people[role], CALLS[least], f"{role}-{least}", "hi", username="a-admin", request={"username": "a-admin"}
    )
    if role.covers(least):
        assert end["success"] and end["output"]["data"] == [f"a-{role} ({role}): hi"]
        assert called == [(least, f"a-{role}")]
    else:
        assert not end["success"] and f"This requires the role {least}; yours is {role}" in end["output"]["error"]
        assert called == []


def test_a_viewer_calls_everything_and_gets_what_viewers_may(people: dict[str, TestClient]) -> None:
    viewer = people[Role.VIEWER]
    called.clear()
    dependencies = viewer.get("/config").json()["dependencies"]
    assert len(dependencies) >= len(CALLS)
    for dependency in dependencies:
        assert dependency["api_visibility"] == "private"
        for route in ("run", "api", "call", "call/v2"):
            answer = viewer.post(
                f"/gradio_api/{route}/{dependency['api_name']}", json={"data": ["x"], "session_hash": "v"}
            )
            assert answer.status_code == 404
        _call(viewer, dependency["id"], f"all-{dependency['id']}", "x")
    assert {least for least, _ in called} <= {Role.VIEWER, "stream"}
    assert {name for _, name in called} == {"a-viewer"}


def test_streams_and_events_reach_their_handlers(people: dict[str, TestClient]) -> None:
    assert _call(people[Role.VIEWER], CALLS["stream"], "s", "abc")["success"]
    picked = _call(
        people[Role.VIEWER], CALLS["select"], "e", "x", event_data={"index": 7, "value": "y", "selected": True}
    )
    assert picked["output"]["data"] == ["x 7"]


def test_errors_are_messages(people: dict[str, TestClient], caplog: pytest.LogCaptureFixture) -> None:
    ours = _call(people[Role.VIEWER], CALLS["fail"], "f1", "ours")["output"]["error"]
    assert ours == "runs/&lt;b&gt;x&lt;/b&gt; is not there"
    other = _call(people[Role.VIEWER], CALLS["fail"], "f2", "other")["output"]["error"]
    assert "bug in llm-ray" in other and "secret" not in other
    number = other.rpartition(" ")[2].strip(".")
    assert any(number in record.message and record.exc_info for record in caplog.records)


def test_nothing_is_told_of_the_api(people: dict[str, TestClient]) -> None:
    config = people[Role.VIEWER].get("/config").json()
    assert (config["analytics_enabled"], config["enable_queue"], config["mcp_server"], config["footer_links"]) == (
        False,
        True,
        False,
        [],
    )
    page = people[Role.VIEWER].get("/calls").text
    assert re.search(r'gradio_api_info = \{"named_endpoints":\s*\{\},\s*"unnamed_endpoints":\s*\{\}\}', page)


def test_a_revoked_user_calls_nothing(people: dict[str, TestClient], home: Path) -> None:
    file = home / "ui" / "users.json"
    kept = file.read_text()
    client = people[Role.ADMIN]
    assert client.get("/config").status_code == 200
    revoke_user(file, "a-admin")
    try:
        assert client.get("/config").status_code == 401
        assert _call(client, CALLS[Role.VIEWER], "r", "x")["success"] is False
    finally:
        file.write_text(kept)


def test_what_has_no_role_cannot_be_connected(tmp_path: Path) -> None:
    def bare(text: str) -> str:
        return text

    with gr.Blocks():
        button = gr.Button()
        with pytest.raises(TypeError, match="'bare' has no least role"):
            on(button.click, bare)
    with pytest.raises(TypeError, match="least role"):
        handler("admin")


def _past_on(site: Site) -> None:
    gr.Button().click(lambda: "x", outputs=gr.Textbox())


def _rendered(site: Site) -> None:
    @gr.render()
    def later() -> None:
        gr.Button().click(lambda: None)


@pytest.mark.parametrize(
    ("screen", "said"), [(_past_on, "connected without a role"), (_rendered, "gr.render connects functions")]
)
def test_the_page_does_not_start_with_a_function_that_asks_for_no_role(
    tmp_path: Path, screen: Callable[[Site], None], said: str
) -> None:
    uploads = Uploads(tmp_path, 1)
    with pytest.raises(TypeError, match=said):
        build(Site(tmp_path, uploads), (Screen("x", "X", screen),))
    check(build(Site(tmp_path, uploads), SCREENS))
