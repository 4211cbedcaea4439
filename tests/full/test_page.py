"""The whole way on the page, with the real small model: from a dropped file to an answer that the base does not give.
It takes the tour's pictures.

make pictures
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

import llm_ray.quickstart
from llm_ray.quickstart.judge import is_right
from llm_ray.serve.deployments.deploy import free_port
from llm_ray.ui.users import Role, add_user
from tests.integration.ui.conftest import (
    LLM_RAY,
    PASSWORD,
    ROOT,
    Running,
    running,
    signed_in_at,
)

DATA = Path(llm_ray.quickstart.__file__).parent / "data"
PICTURES = os.environ.get("LLM_RAY_PICTURES")
SHOWN = Path("/srv/llm-ray")
"""The home that the pictures show, made for them and deleted."""
MINUTE = 60_000  # milliseconds
BASE = "smollm2-135m-instruct"
ASKED = 3
"""Held-out questions."""


@pytest.fixture
def home(tmp_path: Path, smollm2: Path) -> Iterator[Path]:
    home = SHOWN if PICTURES else tmp_path / "home"
    home.mkdir()
    try:
        shutil.copytree(smollm2, home / "models" / BASE)
        add_user(home / "ui" / "users.json", "alice", PASSWORD, Role.ADMIN)
        yield home
        environment = {**os.environ, "LLM_RAY_HOME": str(home), "PYTHONPATH": str(ROOT)}
        subprocess.run([LLM_RAY, "serve", "stop", "--all"], check=True, timeout=200, env=environment)
    finally:
        shutil.rmtree(home)


@pytest.fixture
def page(home: Path) -> Iterator[Running]:
    with running(home, LLM_RAY, "ui", "--port", "0") as page:
        yield page


def picture(tab: Page, name: str) -> None:
    """For the tour, where LLM_RAY_PICTURES names its folder."""
    if PICTURES:
        tab.mouse.move(0, 0)
        tab.evaluate("document.activeElement.blur()")
        tab.screenshot(path=Path(PICTURES) / f"{name}.png", animations="disabled")


def answer(tab: Page, side: str, number: int) -> Locator:
    """What was said to the question with this number, with its figures."""
    return tab.locator(f"{side} .bot.message").nth(number)


@pytest.mark.timeout(3600)
def test_from_a_dropped_file_to_an_answer_that_the_base_does_not_give(
    open_browser: Callable[..., BrowserContext],
    page: Running,
    home: Path,
    tmp_path: Path,
) -> None:
    tab = signed_in_at(open_browser(viewport={"width": 1280, "height": 860}), page, "alice", "data")
    rows = tmp_path / "handbook.jsonl"
    shutil.copy(DATA / "train.jsonl", rows)
    tab.set_input_files("input[type=file]", rows)
    expect(tab.locator("#data-rows pre mark").first).to_be_visible(timeout=3 * MINUTE)
    expect(tab.get_by_label("Model for counting tokens")).to_have_value(BASE)
    picture(tab, "data")

    tab.get_by_role("link", name="Train on this data").click()
    expect(tab.get_by_label("Name")).to_have_value("handbook", timeout=MINUTE)
    expect(tab.locator("#train-command")).to_contain_text("--set name=handbook", timeout=MINUTE)
    tab.get_by_role("button", name="Plan", exact=True).click()
    expect(tab.locator("#train-said")).to_contain_text("Memory", timeout=5 * MINUTE)
    picture(tab, "train")
    tab.get_by_role("button", name="Start", exact=True).click()
    tab.wait_for_url("**/runs?run=handbook", timeout=5 * MINUTE)
    expect(tab.locator("#run-curves svg")).to_have_count(3, timeout=5 * MINUTE)
    expect(tab.locator("#run-state h2")).to_have_text("handbook: done", timeout=40 * MINUTE)
    picture(tab, "runs")

    port = free_port()
    tab.goto(f"{page.url}/deploy?model=handbook")
    expect(tab.get_by_label("Model", exact=True)).to_have_value(re.compile("handbook"), timeout=MINUTE)
    tab.get_by_role("button", name="More").click()
    tab.get_by_label("Port").fill(str(port))
    tab.get_by_label("Cores of a replica").fill("1")
    tab.get_by_role("button", name="Deploy").click()
    expect(tab.locator("#deploy-progress")).to_contain_text("Deploy handbook (alice): done", timeout=6 * MINUTE)
    expect(tab.locator("#deployed")).to_contain_text("running", timeout=MINUTE)
    picture(tab, "deploy")

    tab.goto(f"{page.url}/runs?run=handbook")
    tab.get_by_role("button", name="Compare it with its base").click()
    tab.wait_for_url(f"**/ask?model=handbook&beside={BASE}", timeout=6 * MINUTE)
    expect(tab.get_by_label("Beside it")).to_have_value(BASE, timeout=MINUTE)
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_label("Temperature").fill("0")
    tab.get_by_role("button", name="Settings").click()
    right: dict[str, list[bool]] = {"#ask-left": [], "#ask-right": []}
    facts = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text().splitlines()][:ASKED]
    for number, fact in enumerate(facts):
        tab.locator("#ask-question textarea").fill(fact["prompt"])
        tab.get_by_role("button", name="Send").click()
        for side, found in right.items():
            expect(tab.locator(side).get_by_text(re.compile("tokens/s"))).to_have_count(number + 1, timeout=2 * MINUTE)
            found.append(
                is_right(answer(tab, side, 2 * number).inner_text(), fact["expect"])
            )  # the other is its figures
    picture(tab, "ask")
    assert sum(right["#ask-left"]) >= ASKED - 1, right
    assert not any(right["#ask-right"]), right

    tab.goto(f"{page.url}/cluster")
    expect(tab.locator("#cluster-overview")).to_contain_text("handbook", timeout=MINUTE)
    picture(tab, "cluster")
