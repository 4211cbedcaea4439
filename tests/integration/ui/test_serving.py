"""Deploy, Ask and Cluster as a person uses them, with a model of random weights on one endpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from llm_ray.serve.deployments.deploy import free_port
from tests.integration.tiny import llama
from tests.integration.ui.conftest import LLM_RAY, ROOT, Open, Running, assert_accessible
from tests.waiting import until

LONG = 240_000  # milliseconds: Ray is started
NAME = "tiny"


@pytest.fixture(scope="module")
def url(page: Running, smollm2: Path) -> Iterator[str]:
    """Of the endpoint that the first test starts."""
    llama(page.home / "models" / NAME, smollm2, max_position_embeddings=8192)
    port = free_port()
    yield f"http://127.0.0.1:{port}/v1"
    _llm_ray(page, "serve", "stop", "--all")


def _llm_ray(page: Running, *arguments: str) -> str:
    """What the command prints, for the page's home."""
    environment = {**os.environ, "LLM_RAY_HOME": str(page.home), "PYTHONPATH": str(ROOT)}
    environment["LLM_RAY_CONVERT_ENV"] = "/nowhere"  # so that engine vllm serves
    return subprocess.run(
        [LLM_RAY, *arguments], check=True, timeout=200, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout


def _in_progress(page: Running) -> int:
    return int(json.loads(_llm_ray(page, "serve", "status", "--json"))["models"][NAME]["in_progress"])


def test_a_viewer_deploys_nothing(sign_in: Open, url: str) -> None:
    tab = sign_in("eve", "deploy")
    expect(tab.get_by_label("Model", exact=True)).to_have_value(re.compile("tiny"), timeout=30_000)
    tab.get_by_role("button", name="Deploy").click()
    expect(tab.get_by_text("This requires the role user; yours is viewer.")).to_be_visible()


def test_deploying_from_the_page(sign_in: Open, page: Running, url: str) -> None:
    tab = sign_in("bob", "deploy")
    expect(tab.get_by_label("Model", exact=True)).to_have_value(re.compile("tiny"), timeout=30_000)
    tab.get_by_label("transformers: any causal model, the slowest").check()
    tab.get_by_label("Cores of a replica").fill("1000")
    tab.get_by_role("button", name="More").click()
    tab.get_by_label("Port").fill(url.rpartition(":")[2].removesuffix("/v1"))
    tab.get_by_role("button", name="Deploy").click()
    told = "Nothing was loaded: no room for tiny"
    expect(tab.locator("#deploy-cost")).to_contain_text(told, timeout=LONG)
    with tab.expect_response(re.compile("queue/join"), timeout=LONG):  # the timer's, which draws the screen anew
        pass
    tab.get_by_label("Cores of a replica").fill("1")
    expect(tab.locator("#deploy-command")).to_contain_text("--cpus 1 ", timeout=30_000)
    expect(tab.locator("#deploy-cost")).to_contain_text(told)
    tab.get_by_role("button", name="Deploy").click()
    expect(tab.locator("#deploy-progress")).to_contain_text("Deploy tiny (bob): done", timeout=LONG)
    expect(tab.locator("#deployed")).to_contain_text("running", timeout=30_000)
    assert_accessible(tab)


def test_answers_stream_side_by_side_and_stop(sign_in: Open, page: Running, url: str) -> None:
    tab = sign_in("bob", "ask")
    tab.goto(f"{page.url}/ask?model={NAME}&beside={NAME}")
    expect(tab.get_by_label("Beside it")).to_have_value(NAME, timeout=30_000)
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_label("Most tokens").fill("40")
    tab.locator("#ask-question textarea").fill("Hello")
    tab.get_by_role("button", name="Send").click()
    for side in ("#ask-left", "#ask-right"):
        expect(tab.locator(side)).to_contain_text("tokens/s", timeout=60_000)
    assert_accessible(tab)
    tab.get_by_label("Most tokens").fill("8000")  # a minute, at least
    tab.locator("#ask-question textarea").fill("Again")
    tab.get_by_role("button", name="Send").click()
    expect(tab.locator("#ask-left .message").last).to_be_visible()
    until(lambda: _in_progress(page) == 2)
    tab.get_by_role("button", name="Stop").click()
    expect(tab.locator("#ask-left")).to_contain_text("Stopped.", timeout=60_000)
    until(lambda: _in_progress(page) == 0)


def test_the_examples_run_as_they_stand(url: str) -> None:
    from llm_ray.ui.screens.deploy import snippets

    curl, *programs = snippets(url, NAME, False, "chat")
    assert (
        '"choices"'
        in subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=60).stdout
    )
    for program in programs:
        assert subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()


def test_a_restart_asks_first(sign_in: Open, page: Running, url: str) -> None:
    """What is served starts anew, as it was; it is left alone where the admin thinks better of it, or is none."""
    from llm_ray.ui.screens.deploy import snippets

    tab = sign_in("bob", "cluster")
    _choose(tab, "Deployed model")
    tab.get_by_role("button", name="Restart it").click()
    expect(tab.get_by_text("This requires the role admin; yours is user.")).to_be_visible()
    tab = sign_in("alice", "cluster")
    tab.get_by_role("button", name="Restart it").click()
    expect(tab.get_by_text("Choose a deployed model first.")).to_be_visible()
    _choose(tab, "Deployed model")
    tab.get_by_role("button", name="Restart it").click()
    sure = tab.locator("#cluster-sure").first
    expect(sure).to_contain_text(f"Restart {NAME}? Its requests in progress are completed first")
    assert_accessible(tab)
    tab.get_by_role("button", name="Leave it").click()
    expect(sure).to_be_hidden()
    before = _replicas()
    tab.get_by_role("button", name="Restart it").click()
    tab.get_by_role("button", name="Do it").click()
    expect(tab.locator("#cluster-progress")).to_contain_text(f"Restart {NAME}: done", timeout=LONG)
    assert before - _replicas(), "its process is another one"
    _, program, *_ = snippets(url, NAME, False, "chat")
    assert subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def _choose(tab: Page, label: str, option: str = NAME) -> None:
    tab.get_by_label(label).click(timeout=30_000)
    tab.get_by_role("option", name=re.compile(re.escape(option))).click()


def _replicas() -> set[int]:
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and process.info["cmdline"][0].startswith(f"ray::ServeReplica:model:{NAME}:")
    }


def test_a_key_is_made_and_revoked(sign_in: Open, page: Running, url: str) -> None:
    tab = sign_in("alice", "cluster")
    expect(tab.locator("#cluster-overview")).to_contain_text(NAME, timeout=30_000)
    tab.get_by_label("New key's name").fill("robot")
    tab.get_by_role("button", name="Add a key").click()
    tab.get_by_role("button", name="Do it").click()
    secret_field = tab.locator("#cluster-secret textarea, #cluster-secret input")
    expect(secret_field).to_have_value(re.compile("llmray-"))
    expect(tab.locator("#cluster-keys")).to_contain_text("robot")
    assert_accessible(tab)
    secret = secret_field.input_value()
    assert secret not in page.log
    tab.get_by_label("Key", exact=True).click()
    tab.get_by_role("option", name=re.compile("robot")).click()
    tab.get_by_role("button", name="Revoke it").click()
    tab.get_by_role("button", name="Do it").click()
    expect(tab.locator("#cluster-keys")).to_contain_text("There are no keys yet.")
