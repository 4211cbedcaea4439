"""Signing in and out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from starlette.testclient import TestClient

from llm_ray.ui.login import Link
from llm_ray.ui.screens import Screen
from llm_ray.ui.server import Settings, create_app
from llm_ray.ui.users import Role, add_user

PASSWORD = "several words together"
SCREENS = (Screen("data", "Data", lambda site: None),)


class Site:
    def __init__(self, home: Path, open_: contextlib.ExitStack, link: Link | None = None, **how: Any) -> None:
        settings = Settings(home, **how)
        self.app = create_app(settings, 7860, link, SCREENS)
        self.url = next(iter(settings.allow_origins), f"http{'s' * settings.secure}://127.0.0.1:7860")
        self._open = open_

    def client(self) -> TestClient:
        client = TestClient(self.app, base_url=self.url, headers={"origin": self.url}, follow_redirects=False)
        if not hasattr(self, "portal"):
            self.portal = self._open.enter_context(client).portal
        client.portal = self.portal
        return client


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("home")
    add_user(home / "ui" / "users.json", "alice", PASSWORD, Role.USER)
    with contextlib.ExitStack() as open_:
        yield Site(home, open_)


def _sign_in(
    client: TestClient, name: str = "alice", password: str = PASSWORD, path: str = "/login", **changed: str
) -> Response:
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', client.get(path).text))
    return client.post("/login", data={**fields, "name": name, "password": password, **changed})


def test_in_and_out(site: Site) -> None:
    client = site.client()
    assert client.get("/data").headers["location"] == "/login?next=/data"
    answer = _sign_in(client, path="/login?next=/data")
    assert (answer.status_code, answer.headers["location"]) == (303, "/data")
    kept = next(line for line in answer.headers.get_list("set-cookie") if line.startswith("llm-ray-7860="))  # type: ignore[attr-defined]
    assert (
        {"HttpOnly", "SameSite=strict", "Path=/"} <= set(kept.split("; "))
        and "Secure" not in kept
        and "Domain" not in kept
    )
    assert client.get("/data").status_code == 200
    assert client.get("/login").headers["location"] == "/"
    page = client.get("/logout").text
    assert "<b>alice</b>, role user" in page
    assert client.post("/logout", data={"csrf": "wrong"}).status_code == 200
    assert client.get("/data").status_code == 200  # still in
    stolen = dict(client.cookies)
    csrf = re.search(r'name="csrf" value="([^"]+)"', page)
    assert csrf and client.post("/logout", data={"csrf": csrf[1]}).status_code == 303
    client.cookies.update(stolen)
    assert client.get("/config").status_code == 401  # it has ended here, not in the browser alone


def test_each_login_is_another_session(site: Site) -> None:
    client = site.client()
    client.cookies["llm-ray-7860"] = "chosen-by-somebody"
    _sign_in(client)
    ids = {cookie.value for cookie in client.cookies.jar if cookie.name == "llm-ray-7860"} - {"chosen-by-somebody"}
    assert len(ids) == 1 and len(ids.pop()) >= 43


@pytest.mark.parametrize(
    ("name", "password"), [("alice", "wrong"), ("mallory", PASSWORD), ("", ""), ("alice", "x" * 5000), ("<b>", "wrong")]
)
def test_a_wrong_password_is_told_without_telling_which(site: Site, name: str, password: str) -> None:
    answer = _sign_in(site.client(), name, password)
    assert answer.status_code == 401
    text = bytes(answer.content).decode()  # type: ignore[attr-defined]
    assert '<p role="alert">Wrong name or password.</p>' in text
    assert "<b>" not in text
    assert all("llm-ray-7860=" not in line for line in answer.headers.get_list("set-cookie"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("csrf", ["", "guessed"])
def test_a_form_that_is_not_ours_signs_nobody_in(site: Site, csrf: str) -> None:
    assert _sign_in(site.client(), csrf=csrf).status_code == 403
    bare = site.client()
    assert bare.post("/login", data={"name": "alice", "password": PASSWORD, "csrf": csrf}).status_code == 403


def test_a_link_to_a_run_is_kept_over_signing_in(site: Site) -> None:
    asked = site.client().get("/data?run=a%20b&x=1").headers["location"]
    assert asked == "/login?next=/data%3Frun%3Da%2520b%26x%3D1"
    assert _sign_in(site.client(), next="/data?run=a%20b&x=1").headers["location"] == "/data?run=a%20b&x=1"
    assert (
        _sign_in(site.client(), next="//data?x=//evil.example.org").headers["location"] == "/data?x=//evil.example.org"
    )


@pytest.mark.parametrize(
    "next",
    [
        "https://evil.example.org",
        "//evil.example.org",
        "/\\evil",
        "javascript:alert(1)",
        "/config",
        "/logout",
        "data:x",
        '"><b>',
    ],
)
def test_a_link_leads_to_a_screen_or_the_first(site: Site, next: str) -> None:
    client = site.client()
    assert "<b>" not in client.get("/login", params={"next": next}).text
    assert _sign_in(client, next=next).headers["location"] == "/"


def test_too_many_wrong_passwords_lock_also_the_right_one(tmp_path: Path) -> None:
    add_user(tmp_path / "ui" / "users.json", "alice", PASSWORD, Role.USER)
    with contextlib.ExitStack() as open_:
        site = Site(tmp_path, open_)
        assert [_sign_in(site.client(), password="wrong").status_code for _ in range(6)] == [401] * 5 + [429]
        locked = _sign_in(site.client())
        assert locked.status_code == 429 and 0 < int(locked.headers["retry-after"]) <= 30
        assert "try again in" in bytes(locked.content).decode()  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", [{"certificate": Path("page.pem")}, {"allow_origins": ("https://llm.example.org",)}])
def test_with_tls_the_cookie_is_bound_to_the_host(tmp_path: Path, how: dict[str, Any]) -> None:
    add_user(tmp_path / "ui" / "users.json", "alice", PASSWORD, Role.USER)
    with contextlib.ExitStack() as open_:
        answer = _sign_in(Site(tmp_path, open_, **how).client())
        kept = next(line for line in answer.headers.get_list("set-cookie") if line.startswith("__Host-llm-ray="))  # type: ignore[attr-defined]
        assert {"HttpOnly", "Secure", "SameSite=strict", "Path=/"} <= set(kept.split("; ")) and "Domain" not in kept
        assert answer.headers["strict-transport-security"]


def test_without_users_a_link_opens_the_page_once(tmp_path: Path) -> None:
    printed: list[str] = []
    link = Link(printed.append)
    link.renew()
    with contextlib.ExitStack() as open_:
        site = Site(tmp_path, open_, link=link)
        nobody = site.client()
        assert "open the link that" in nobody.get("/login").text and "password" not in nobody.get("/login").text
        assert _sign_in(nobody, path="/login?token=guessed").status_code == 401
        first = site.client()
        assert first.get(f"/login?token={printed[0]}").status_code == 200  # to look does not use it up
        assert _sign_in(first, path=f"/login?token={printed[0]}").status_code == 303
        assert first.get("/data").status_code == 200
        assert _sign_in(nobody, path=f"/login?token={printed[0]}").status_code == 401
        assert len(printed) == 2
        add_user(tmp_path / "ui" / "users.json", "alice", PASSWORD, Role.USER)
        assert first.get("/config").status_code == 401
        assert _sign_in(nobody, path=f"/login?token={printed[1]}").status_code == 401
        assert _sign_in(nobody).status_code == 303
