"""A cluster that goes away while the page shows it, and comes back."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import BrowserContext, expect

from llm_ray.serve.deployments.deploy import free_port
from llm_ray.ui.users import Role, add_user
from tests.integration.ui.conftest import LLM_RAY, PASSWORD, assert_accessible, running, signed_in_at

LONG = 180_000  # milliseconds


def head(port: int) -> contextlib.AbstractContextManager[None]:
    """A cluster of one node."""
    return node("--head", f"--port={port}", "--node-ip-address=127.0.0.1", f"--dashboard-port={free_port()}")


@contextlib.contextmanager
def node(*options: str) -> Iterator[None]:
    """A node of a cluster, with one core."""
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    process = subprocess.Popen(
        [*ray, f"--object-store-memory={100 * 2**20}", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in everybody:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's, which nodes and page share."""
    file = tmp_path / "token"
    file.write_text(secrets.token_hex(32))
    file.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))


@pytest.mark.long  # a cluster of its own; draining without a page is tested in the lab
def test_a_worker_is_drained(open_browser: Callable[..., BrowserContext], tmp_path: Path) -> None:
    """It is asked first; the head is not offered."""
    add_user(tmp_path / "ui" / "users.json", "alice", PASSWORD, Role.ADMIN)
    port = free_port()
    with head(port), running(tmp_path, LLM_RAY, "ui", "--port", "0", "--address", f"127.0.0.1:{port}") as page:
        tab = signed_in_at(open_browser(), page, "alice", "cluster")
        hosts = tab.locator("#cluster-overview").get_by_role("table", name="Hosts")
        expect(hosts).to_contain_text("(head)", timeout=LONG)
        with node(f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.2"):
            expect(hosts).to_contain_text("127.0.0.2", timeout=LONG)
            tab.get_by_label("Worker").click()
            expect(tab.get_by_role("option")).to_have_count(1)
            tab.get_by_role("option", name="127.0.0.2").click()
            tab.get_by_role("button", name="Drain it").click()
            expect(tab.locator("#cluster-sure").first).to_contain_text("Drain 127.0.0.2? It accepts no more work")
            tab.get_by_role("button", name="Do it").click()
            expect(tab.locator("#cluster-progress")).to_contain_text("Drain 127.0.0.2: done", timeout=LONG)
            expect(hosts).not_to_contain_text("127.0.0.2", timeout=LONG)
            expect(hosts).to_contain_text("(head)")


def test_a_cluster_that_dies_is_shown_as_away_and_comes_back_by_itself(
    open_browser: Callable[..., BrowserContext], tmp_path: Path
) -> None:
    add_user(tmp_path / "ui" / "users.json", "alice", PASSWORD, Role.ADMIN)
    port = free_port()
    with running(tmp_path, LLM_RAY, "ui", "--port", "0", "--address", f"127.0.0.1:{port}") as page:
        tab = signed_in_at(open_browser(), page, "alice", "cluster")
        overview = tab.locator("#cluster-overview")
        expect(overview).to_contain_text("The cluster is unreachable", timeout=LONG)  # it has never been there
        for _ in range(2):
            with head(port):
                expect(overview.get_by_role("table", name="Hosts")).to_contain_text("(head)", timeout=LONG)
                expect(overview).to_contain_text("No model is deployed")
            expect(overview).to_contain_text("The cluster is unreachable", timeout=LONG)
            assert_accessible(tab)
        for screen in ("data", "train", "runs", "deploy", "ask"):  # the page goes on
            tab.goto(f"{page.url}/{screen}")
            expect(tab.locator("h1#content")).to_be_visible()
        assert page.process.poll() is None
        assert "Traceback" not in page.log
    assert not [
        process for process in psutil.Process(os.getpid()).children(recursive=True) if "raylet" in process.name()
    ]
