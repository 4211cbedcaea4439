"""From a dropped file to a trained model, on the page: a real finetune of a tiny model, which outlives the page that
started it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from llm_ray.runs.folder import holder
from llm_ray.ui.users import Role, add_user
from tests.integration.tiny import llama
from tests.integration.ui.conftest import LLM_RAY, PASSWORD, Running, assert_accessible, running, signed_in_at

Browsers = Callable[..., BrowserContext]
ROWS = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(24)]
LONG = 180_000  # milliseconds
STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    home = tmp_path_factory.mktemp("training")
    (home / "models").mkdir()
    llama(home / "models" / "tiny", smollm2, hidden_size=16)  # seconds, in place of minutes
    for name in ("alice", "bob"):
        add_user(home / "ui" / "users.json", name, PASSWORD, Role.USER)
    return home


@pytest.fixture(scope="module")
def page(home: Path) -> Iterator[Running]:
    with running(home, LLM_RAY, "ui", "--port", "0") as page:
        yield page


def _signed_in(browsers: Browsers, page: Running, name: str, screen: str) -> Page:
    return signed_in_at(browsers(viewport={"width": 1280, "height": 900}), page, name, screen)


def _accessible(tab: Page) -> None:
    """At both widths, light and dark."""
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            tab.set_viewport_size({"width": width, "height": 900})
            tab.emulate_media(color_scheme=scheme)
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"{tab.url} is wider than {width} pixels"
            )
            assert_accessible(tab)
    tab.set_viewport_size({"width": 1280, "height": 900})


def test_from_a_file_to_a_trained_model(open_browser: Browsers, page: Running, home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "sums.jsonl"
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS) + json.dumps({"prompt": "And this?", "completion": ""}) + "\n"
    )
    tab = _signed_in(open_browser, page, "alice", "data")
    tab.set_input_files("input[type=file]", rows)
    expect(tab.locator("#data-rows pre").first).to_contain_text("What is 0 plus one?", timeout=LONG)
    assert tab.locator("#data-rows pre mark").first.inner_text() == "It is 1.<|im_end|>"
    expect(tab.locator("#data-summary")).to_contain_text("dropped: sums.jsonl:25: nothing to learn in it")
    assert str(home) not in tab.locator("#data-summary").inner_text()
    expect(tab.get_by_role("img", name="Sequences by tokens")).to_be_visible()
    tab.get_by_role("button", name="Later rows").click()
    expect(tab.locator("#data-rows pre").first).to_contain_text("What is 5 plus one?")
    _accessible(tab)

    tab.get_by_role("link", name="Train on this data").click()
    expect(tab.get_by_label("Name")).to_have_value("sums", timeout=LONG)
    settings = {"stages": "[prepare, train]", "max_steps": str(STEPS), "global_batch_size": "4", "validate_every": "20"}
    tab.get_by_role("button", name="All settings").click()
    tab.get_by_role("button", name=re.compile("^Training")).click()
    for label, value in settings.items():
        named = tab.locator("[data-testid=block-info]", has_text=re.compile(rf"^\s*{label}\s*$"))
        tab.locator("label").filter(has=named).locator("input, textarea").fill(value)
    expect(tab.locator("#train-conf")).to_contain_text(f"max_steps: {STEPS}", timeout=LONG)
    expect(tab.locator("#train-command")).to_contain_text("--set name=sums")
    _accessible(tab)
    tab.get_by_role("button", name="Start", exact=True).click()
    tab.wait_for_url("**/runs?run=sums", timeout=2 * LONG)
    expect(tab.locator("#run-curves svg").first).to_be_visible(timeout=LONG)  # comes by itself
    _accessible(tab)

    driver = holder(home / "runs" / "sums")
    assert driver is not None
    page.end(signal.SIGKILL)
    now = holder(home / "runs" / "sums")
    assert now is None or now == driver  # at work, or done meanwhile; never anew
    with running(home, LLM_RAY, "ui", "--port", "0") as again:
        tab = _signed_in(open_browser, again, "bob", "runs?run=sums")
        expect(tab.locator("#run-state h2")).to_have_text("sums: done", timeout=LONG)
        written = [json.loads(line) for line in (home / "runs" / "sums" / "metrics.jsonl").read_text().splitlines()]
        assert written[-1]["step"] == STEPS
        shown = tab.locator("#run-curves figure").first.locator("circle.curve-0 title").all_text_contents()
        assert shown == [f"loss, step {row['step']}: {row['loss']:.6g}" for row in written]
        validated = tab.locator("#run-curves figure").first.locator("circle.curve-1 title").all_text_contents()
        known = [row for row in written if "validation_loss" in row]
        assert validated == [f"validation loss, step {row['step']}: {row['validation_loss']:.6g}" for row in known]
        expect(tab.locator("#run-state")).to_contain_text(f"{STEPS}/{STEPS}")
        expect(tab.locator("#run-log")).to_contain_text("train: done in")

        tab.goto(f"{again.url}/data?data=my%20files%2Fsums.jsonl")  # of another person
        expect(tab.locator("#data-said")).to_contain_text("neither one of your files")
        assert not list((home / "uploads" / "bob").iterdir())

        tab.goto(f"{again.url}/runs?run=sums")
        tab.get_by_role("button", name="Delete sums").click()
        tab.get_by_role("button", name="Delete it permanently").click()
        expect(tab.get_by_text("Type the run's name")).to_be_visible()
        tab.get_by_label("The run's name, to confirm").fill("sums")
        tab.get_by_role("button", name="Delete it permanently").click()
        expect(tab.locator("#runs-said")).to_contain_text("sums is deleted.")
        assert not (home / "runs" / "sums").exists()
