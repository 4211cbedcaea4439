"""Runs as a person handles them on the page: one waits for another, stops, goes on, is compared; a conf fills the
form."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from playwright.sync_api import BrowserContext, Page, expect

from llm_ray.runs.folder import holder
from llm_ray.ui.users import Role, add_user
from tests.integration.tiny import llama
from tests.integration.ui.conftest import LLM_RAY, PASSWORD, Running, assert_accessible, running, signed_in_at
from tests.waiting import until

Browsers = Callable[..., BrowserContext]
LONG = 240_000  # milliseconds
STEPS = {"first": 20_000, "second": 20}  # of the first more than are done before it is stopped


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    home = tmp_path_factory.mktemp("runs")
    (home / "models").mkdir()
    llama(home / "models" / "tiny", smollm2, hidden_size=16)
    (home / "data").mkdir()
    rows = ({"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(24))
    (home / "data" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, role in {"alice": Role.USER, "eve": Role.VIEWER}.items():
        add_user(home / "ui" / "users.json", name, PASSWORD, role)
    return home


@pytest.fixture(scope="module")
def page(home: Path) -> Iterator[Running]:
    with running(home, LLM_RAY, "ui", "--port", "0") as page:
        yield page


@pytest.fixture
def tab(open_browser: Browsers, page: Running) -> Page:
    return signed_in_at(open_browser(viewport={"width": 1280, "height": 900}), page, "alice", "train")


def _send_conf(tab: Page, page: Running, tmp_path: Path, name: str, text: str | None = None) -> None:
    """Fill the form from a conf, as one that was downloaded."""
    settings = {
        "max_steps": STEPS.get(name, 1),
        "global_batch_size": 4,
        "learning_rate": 1e-3 if name == "first" else 2e-3,
    }
    conf = {
        "name": name,
        "model": {"base": "tiny"},
        "data": {"train": ["sums.jsonl"], "validation": None},
        "training": settings,
    }
    file = tmp_path / f"{name}.yaml"
    file.write_text(
        text or yaml.safe_dump({**conf, "checkpoint": {"every_steps": 200}, "stages": ["prepare", "train"]})
    )
    tab.wait_for_load_state()  # else what is still on its way breaks the next navigation off
    tab.goto(f"{page.url}/train")
    expect(tab.get_by_label("Model", exact=True)).to_have_value("tiny", timeout=LONG)
    tab.set_input_files("input[type=file]", file)


def _start(tab: Page, page: Running, tmp_path: Path, name: str) -> None:
    _send_conf(tab, page, tmp_path, name)
    expect(tab.get_by_label("Name")).to_have_value(name, timeout=LONG)
    expect(tab.locator("#train-conf")).to_contain_text(f"max_steps: {STEPS[name]}", timeout=LONG)
    expect(tab.locator("#train-command")).to_contain_text(f"--set name={name}")
    tab.get_by_role("button", name="Start", exact=True).click()
    tab.wait_for_url(f"**/runs?run={name}", timeout=LONG)


def _steps(home: Path, name: str) -> list[int]:
    file = home / "runs" / name / "metrics.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return [row["step"] for row in rows if "loss" in row]


def test_a_conf_that_is_none_names_the_key(tab: Page, page: Running, tmp_path: Path) -> None:
    _send_conf(tab, page, tmp_path, "wrong", "name: wrong\ntraining:\n  learning_rat: 1\n")
    expect(tab.get_by_text(re.compile(r"wrong\.yaml: .*learning_rat"))).to_be_visible(timeout=LONG)
    expect(tab.get_by_label("Name")).to_have_value("")


@contextlib.contextmanager
def _held(home: Path, name: str) -> Iterator[None]:
    """Meanwhile the run computes nothing, so that the page has the cores."""
    driver = holder(home / "runs" / name)
    assert driver is not None
    processes = psutil.Process(driver["pid"]).children(recursive=True)
    (worker,) = (process for process in processes if "RayTrainWorker" in " ".join(process.cmdline()))
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


@pytest.mark.long  # two finetunes; the queue, stopping and comparing are tested without a page
def test_one_waits_while_another_learns(tab: Page, page: Running, home: Path, tmp_path: Path) -> None:
    _start(tab, page, tmp_path, "first")
    expect(tab.locator("#run-curves svg").first).to_be_visible(timeout=LONG)
    with _held(home, "first"):
        _start(tab, page, tmp_path, "second")
        expect(tab.locator("#run-state h2")).to_have_text(re.compile("second: waiting, 1 ahead"), timeout=LONG)
        expect(tab.locator("#run-state")).to_contain_text("requested by alice")

    tab.goto(f"{page.url}/runs?run=first")
    tab.get_by_role("button", name="Stop", exact=True).click()
    expect(tab.locator("#runs-said")).to_contain_text("it stops after its current step, with a checkpoint")
    expect(tab.locator("#run-state h2")).to_have_text("first: stopped", timeout=LONG)
    assert 0 < len(_steps(home, "first")) < STEPS["first"]

    tab.goto(f"{page.url}/runs?run=second")  # its turn has come
    expect(tab.locator("#run-state h2")).to_have_text("second: done", timeout=LONG)
    assert _steps(home, "second") == list(range(1, STEPS["second"] + 1))


@pytest.mark.long  # another start of Ray; that a run resumes is tested without a page
def test_what_is_stopped_goes_on(tab: Page, page: Running, home: Path) -> None:
    reached = _steps(home, "first")
    tab.goto(f"{page.url}/runs?run=first")
    tab.get_by_role("button", name="Resume").click()
    expect(tab.locator("#runs-said")).to_contain_text("resumes from its last checkpoint")
    expect(tab.locator("#run-state h2")).to_have_text("first: running", timeout=LONG)
    until(lambda: len(_steps(home, "first")) > len(reached), timeout=LONG / 1000)
    tab.get_by_role("button", name="Stop", exact=True).click()
    expect(tab.locator("#run-state h2")).to_have_text("first: stopped", timeout=LONG)
    assert (steps := _steps(home, "first")) == list(range(1, len(steps) + 1))  # each once: it did not begin anew


@pytest.mark.long  # of those two
def test_runs_are_compared(tab: Page, page: Running) -> None:
    tab.goto(f"{page.url}/runs?compare=first,second")
    comparison = tab.locator("#runs-comparison")
    expect(comparison.locator("figure svg polyline")).to_have_count(2, timeout=LONG)
    differ = comparison.get_by_role("table", name="Differences between their confs")
    expect(differ.get_by_role("row", name=re.compile("training.learning_rate"))).to_contain_text("0.002")
    expect(differ.get_by_role("row", name=re.compile("training.max_steps"))).to_contain_text("20,000")
    expect(differ).not_to_contain_text("global_batch_size")
    assert_accessible(tab)


@pytest.mark.long  # of those two; that roles are checked in each handler is a unit test
def test_a_viewer_stops_nothing(open_browser: Browsers, page: Running, home: Path) -> None:
    tab = signed_in_at(open_browser(), page, "eve", "runs?run=first")
    tab.get_by_role("button", name="Delete first").click()
    tab.get_by_label("The run's name, to confirm").fill("first")
    tab.get_by_role("button", name="Delete it permanently").click()
    expect(tab.get_by_text("This requires the role user; yours is viewer.")).to_be_visible()
    assert (home / "runs" / "first").is_dir()
