"""The page as a person meets it: signing in, getting about, and what is kept from whom."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import BrowserContext, expect

from llm_ray.ui.screens import SCREENS
from llm_ray.ui.users import Role, add_user, change_user, revoke_user
from tests.integration.ui.conftest import LLM_RAY, PASSWORD, ROOT, Open, Running, assert_accessible, fill_in, running

Browsers = Callable[..., BrowserContext]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_screen_at_its_url(sign_in: Open, page: Running, width: int, scheme: str) -> None:
    asked: set[str] = set()
    problems: list[str] = []
    tab = sign_in("alice", color_scheme=scheme, viewport={"width": width, "height": 800})
    tab.on("request", lambda request: asked.add(request.url.split("?")[0]))
    tab.on(
        "response", lambda answer: problems.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
    )
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    for screen in SCREENS:
        tab.get_by_role("link", name=screen.title, exact=True).click()
        tab.wait_for_url(f"{page.url}/{screen.path}")
        expect(tab.get_by_role("heading", level=1)).to_have_text(screen.title)
        expect(tab.locator("[aria-current=page]")).to_have_text(screen.title)
        expect(tab.get_by_role("button").first).to_be_visible()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            f"{screen.path} is wider than {width} pixels"
        )
        assert_accessible(tab)
    assert {url for url in asked if not url.startswith((page.url, "data:", "blob:"))} == set()
    broken_off = re.compile("abort|errored out", re.IGNORECASE)  # the streams of a screen that is left
    assert [problem for problem in problems if not broken_off.search(problem)] == []


def test_with_the_keyboard_alone(sign_in: Open, page: Running) -> None:
    tab = sign_in("alice")
    reached = []
    for _ in range(20):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.innerText"))
        assert (
            tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        )  # it is seen where one is
        if reached[-1] == "Cluster":
            break
    assert reached == ["Skip to the content", *(screen.title for screen in SCREENS)]
    tab.keyboard.press("Enter")
    tab.wait_for_url(f"{page.url}/cluster")


def test_signing_in_and_out(open_browser: Browsers, page: Running) -> None:
    context = open_browser(java_script_enabled=False)  # signing in needs none
    tab = context.new_page()
    tab.goto(f"{page.url}/runs")
    assert tab.url == f"{page.url}/login?next=/runs"
    fill_in(tab, tab.url, "alice", "something else")
    expect(tab.get_by_role("alert")).to_have_text("Wrong name or password.")
    fill_in(tab, f"{page.url}/runs", "alice", PASSWORD)
    assert tab.url == f"{page.url}/runs"
    (cookie,) = (cookie for cookie in context.cookies() if not cookie["name"].endswith("-form"))
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["domain"], cookie["path"]) == (
        True,
        "Strict",
        "127.0.0.1",
        "/",
    )
    tab.goto(f"{page.url}/logout")
    tab.get_by_role("button", name="Sign out").click()
    assert tab.url == f"{page.url}/login"
    tab.goto(f"{page.url}/runs")
    assert tab.url == f"{page.url}/login?next=/runs"


def test_the_forms_are_accessible(open_browser: Browsers, page: Running) -> None:
    for scheme in ("light", "dark"):
        tab = open_browser(color_scheme=scheme, viewport={"width": 390, "height": 800}).new_page()
        fill_in(tab, f"{page.url}/login", "nobody", "something else")
        assert_accessible(tab)
        fill_in(tab, f"{page.url}/login", "alice", PASSWORD)
        tab.goto(f"{page.url}/logout")
        assert_accessible(tab)


def test_a_name_is_locked_after_wrong_passwords(open_browser: Browsers, page: Running) -> None:
    tab = open_browser().new_page()
    for _ in range(5):
        fill_in(tab, f"{page.url}/login", "carol", "something else")
        expect(tab.get_by_role("alert")).to_have_text("Wrong name or password.")
    fill_in(tab, f"{page.url}/login", "carol", PASSWORD)
    expect(tab.get_by_role("alert")).to_contain_text("Too many wrong passwords: try again in")


def test_a_user_calls_what_a_viewer_may_not(sign_in: Open) -> None:
    for name, role in (("bob", "user"), ("eve", "viewer")):
        tab = sign_in(name, "try")
        tab.get_by_label("Name").fill("you")
        tab.get_by_role("button", name="Greet").click()
        if role == "user":
            expect(tab.get_by_label("Answer")).to_have_value("Hello you, says bob")
        else:
            expect(tab.get_by_text("This requires the role user; yours is viewer.")).to_be_visible()
            expect(tab.get_by_label("Answer")).to_have_value("")


def test_a_file_goes_to_its_senders_folder(sign_in: Open, page: Running, tmp_path: Path) -> None:
    rows = tmp_path / "my rows.jsonl"
    rows.write_text("{}")
    for name in ("alice", "bob"):
        tab = sign_in(name, "try")
        tab.set_input_files("input[type=file]", rows)
        expect(tab.get_by_label("Answer")).to_have_value(f"uploads/{name}/my_rows.jsonl: {{}}")
    assert [file for file in (page.home / "ui" / "cache").rglob("*") if file.is_file() and file.stat().st_size] == []
    tab = sign_in("eve", "try")
    with tab.expect_response(lambda answer: "/upload" in answer.url) as answer:
        tab.set_input_files("input[type=file]", rows)
    assert answer.value.status == 403
    tab = sign_in("bob", "try")  # by a request of its own: Gradio's browser side looks at sizes, too
    sent = """async size => {
        const form = new FormData();
        form.append("files", new Blob(["x".repeat(size)]), "rows.jsonl");
        return (await fetch("/gradio_api/upload", {method: "POST", body: form})).status;
    }"""
    assert [tab.evaluate(sent, size) for size in (2**19, 2**21)] == [200, 413]


@pytest.mark.parametrize("change", ["role", "revoke"])
def test_a_change_of_the_user_ends_an_open_page(sign_in: Open, page: Running, change: str) -> None:
    users = page.home / "ui" / "users.json"
    add_user(users, "dave", PASSWORD, Role.USER)
    try:
        tab = sign_in("dave", "try")
        tab.get_by_role("button", name="Count").click()
        expect(tab.get_by_label("Answer")).to_have_value(re.compile(r"\d+"))
        change_user(users, "dave", role=Role.VIEWER) if change == "role" else revoke_user(users, "dave")
        tab.wait_for_timeout(3000)
        seen = tab.get_by_label("Answer").input_value()
        tab.wait_for_timeout(1000)
        assert tab.get_by_label("Answer").input_value() == seen
        tab.reload()
        assert tab.url.startswith(f"{page.url}/login")
    finally:
        if change == "role":
            revoke_user(users, "dave")


def test_html_that_comes_into_the_page_runs_nothing(sign_in: Open) -> None:
    tab = sign_in("alice")
    tab.evaluate("""() => {
        const part = document.createElement("div");
        document.body.append(part);
        part.innerHTML = '<img src="/nothing" onerror="window.ran = 1"><a href="javascript:window.ran = 2">x</a>';
        const script = document.createElement("script");
        script.textContent = "window.ran = 3";
        document.body.append(script);
        part.querySelector("a").click();
    }""")
    tab.wait_for_timeout(500)
    assert tab.evaluate("window.ran") is None
    assert tab.evaluate("fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'refused')") == "refused"


def test_other_sites_and_names_are_refused(page: Running) -> None:
    with httpx.Client(base_url=page.url) as client:
        assert client.get("/login").status_code == 200
        for path in ("/login", "/config", "/assets/index.js", "/gradio_api/heartbeat/x"):
            assert client.get(path, headers={"host": "evil.example.org"}).status_code == 421
            answer = client.get(path, headers={"origin": "https://evil.example.org"})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        assert client.post("/gradio_api/upload", headers={"origin": "null"}).status_code == 403
        assert client.post("/login", data={"name": "alice", "password": PASSWORD}).status_code == 403


def test_a_page_of_another_site_cannot_show_or_use_it(sign_in: Open, page: Running) -> None:
    tab = sign_in("alice")
    other = tab.context.new_page()
    other.route(
        "http://127.0.0.3/",
        lambda route: route.fulfill(body=f'<iframe src="{page.url}/data"></iframe>', content_type="text/html"),
    )
    other.goto("http://127.0.0.3/")
    other.wait_for_timeout(1000)
    assert other.frames[1].url.startswith("chrome-error://")
    told = "fetch(url, {method: 'POST', credentials: 'include', mode: 'no-cors', body: 'x'}).then(r => r.type, e => 'refused')"
    assert other.evaluate(f"url => {told}", f"{page.url}/logout") in ("refused", "opaque")
    tab.reload()
    expect(tab.get_by_role("heading", level=1)).to_have_text("Data")  # still signed in


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_while_pages_are_open(open_browser: Browsers, tmp_path: Path, by: signal.Signals) -> None:
    with running(tmp_path, LLM_RAY, "ui", "--port", "0") as page:  # and without users, by the link that it prints
        tab = open_browser().new_page()
        tab.goto(page.url)
        tab.get_by_role("button", name="Sign in").click()
        expect(tab.get_by_role("heading", level=1)).to_have_text("Data")
        second = open_browser().new_page()
        second.goto(page.url)
        second.get_by_role("button", name="Sign in").click()
        expect(second.get_by_role("alert")).to_contain_text("This link has already been used")
        second.goto(page.urls(2)[1])
        second.get_by_role("button", name="Sign in").click()
        expect(second.get_by_role("heading", level=1)).to_have_text("Data")
        assert page.end(by) == 0
        assert "Traceback" not in page.log and "ERROR" not in page.log
    assert list((tmp_path / "ui" / "cache").iterdir()) == []


def test_with_tls(open_browser: Browsers, tmp_path: Path) -> None:
    add_user(tmp_path / "ui" / "users.json", "alice", PASSWORD, Role.ADMIN)
    certificate, key = tmp_path / "page.pem", tmp_path / "page.key"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=127.0.0.1",
        "-keyout",
        key,
        "-out",
        certificate,
    ]
    subprocess.run(made, check=True, capture_output=True)
    with running(tmp_path, LLM_RAY, "ui", "--port", "0", "--tls-cert", str(certificate), "--tls-key", str(key)) as page:
        assert page.url.startswith("https://127.0.0.1:")
        context = open_browser(ignore_https_errors=True)
        fill_in(tab := context.new_page(), f"{page.url}/ask", "alice", PASSWORD)
        expect(tab.get_by_role("heading", level=1)).to_have_text("Ask")
        (cookie,) = (cookie for cookie in context.cookies() if not cookie["name"].endswith("-form"))
        assert (cookie["name"], cookie["secure"]) == ("__Host-llm-ray", True)


def test_a_port_that_is_taken_and_files_that_are_no_certificate(page: Running, tmp_path: Path) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        ended = subprocess.run(
            [LLM_RAY, "ui", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
            env=_environment(tmp_path),
        )
        return ended.returncode, ended.stderr

    port = page.url.rpartition(":")[2]
    code, text = said("--port", port)
    assert (code, f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose another with --port" in text) == (
        1,
        True,
    )
    (empty := tmp_path / "empty").touch()
    code, text = said("--tls-cert", str(empty), "--tls-key", str(empty))
    assert code == 2 and "Both are PEM files" in text
    assert said("--tls-cert", str(empty))[0] == 2
    assert said("--allow-origin", "llm.example.org")[0] == 2


def _environment(home: Path) -> dict[str, str]:
    import os

    return {**os.environ, "LLM_RAY_HOME": str(home), "PYTHONPATH": str(ROOT)}


@pytest.mark.root
def test_with_the_network_cut(tmp_path: Path) -> None:
    """Page and browser in a network namespace that has loopback alone."""
    add_user(tmp_path / "ui" / "users.json", "alice", PASSWORD, Role.ADMIN)
    command = "ip link set lo up && exec " + " ".join([sys.executable, "-m", "tests.integration.ui.cut_off"])
    ended = subprocess.run(
        ["unshare", "--net", "bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env=_environment(tmp_path),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines() == [screen.title for screen in SCREENS]
