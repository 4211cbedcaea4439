"""The web page: seconds until it is usable, its overhead on a chat's first token, and the idle CPU use of ten open
tabs."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.table import comparison
from llm_ray.serve.deployments.deploy import free_port

LLM_RAY = str(Path(sys.executable).with_name("llm-ray"))
SCREENS = ("data", "train", "runs", "deploy", "ask", "cluster")
_TABS = 10
_IDLE = 60.0  # seconds
_ASKED = 12


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures a page and an endpoint with the model, both started on this machine."""
    home = work / "page"
    environment = {**os.environ, "LLM_RAY_HOME": str(home)}
    (home / "models").mkdir(parents=True)
    (home / "models" / "small").symlink_to(model)
    port = free_port()
    deploy = [LLM_RAY, "serve", "deploy", "--model", "small", "--port", str(port), "--max-model-len", "2048"]
    subprocess.run(deploy, check=True, env=environment)
    try:
        with _page(home, environment) as (process, url, started), sync_playwright() as playwright:
            root = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=root)
            tab = browser.new_context().new_page()
            tab.goto(url)
            base = url.partition("/login")[0]
            tab.get_by_role("button", name="Sign in").click()
            tab.wait_for_selector("h1#content")
            usable = {
                screen: statistics.median(_usable(tab, f"{base}/{screen}") for _ in range(3)) for screen in SCREENS
            }
            _open_talk(tab, base)
            through, direct = [], []
            for number in range(_ASKED):  # alternating, since the load of the machine varies
                through.append(_asked(tab, number))
                direct.append(_direct(f"http://127.0.0.1:{port}/v1", number))
            idle = _idle(process, browser, tab, base)
            browser.close()
    finally:
        subprocess.run([LLM_RAY, "serve", "stop", "--all"], check=True, env=environment)
    slowest = max(usable.values())
    page_ms, direct_ms = 1000 * statistics.median(through), 1000 * statistics.median(direct)
    table = [
        comparison("page: slowest screen until usable, s", slowest, 2.0, "below 1 x (2 s)"),
        comparison("page: a chat's first token, ms, against the API's", page_ms, direct_ms, "at most 50 ms more"),
        comparison(
            f"page: CPU with {_TABS} tabs open while nothing happens, % of a core", 100 * idle, 5.0, "below 1 x (5 %)"
        ),
    ]
    return {
        "seconds to start": started,
        "seconds until usable": usable,
        "first token ms": [page_ms, direct_ms],
        "idle": idle,
        "table": table,
    }


@contextlib.contextmanager
def _page(home: Path, environment: dict[str, str]) -> Iterator[tuple[psutil.Process, str, float]]:
    began = time.monotonic()
    with subprocess.Popen(
        [LLM_RAY, "ui", "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            url = next(found[1] for line in process.stdout or () if (found := re.search(r"The page: (\S+)", line)))
            yield psutil.Process(process.pid), url, time.monotonic() - began
        finally:
            process.terminate()


def _usable(tab: Page, url: str) -> float:
    """Returns the seconds until the screen is usable: its heading is visible, and Gradio has mounted its components."""
    began = time.monotonic()
    tab.goto(url, wait_until="commit")
    tab.wait_for_selector("h1#content")
    tab.wait_for_selector("gradio-app .gradio-container button, .gradio-container table")
    return time.monotonic() - began


def _open_talk(tab: Page, base: str) -> None:
    tab.goto(f"{base}/ask?model=small")
    tab.locator("#ask-state").get_by_text(re.compile("Answers come from")).wait_for()
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_label("Most tokens").fill("8")
    tab.evaluate(_WATCH)


_WATCH = """() => {
  window.asked = window.answered = 0;
  const send = [...document.querySelectorAll('button')].find(button => button.textContent.trim() === 'Send');
  send.addEventListener('click', () => { window.asked = performance.now(); window.answered = 0; }, {capture: true});
  new MutationObserver(() => {
    if (!window.answered && document.querySelector('#ask-left .bot.message')) window.answered = performance.now();
  }).observe(document.querySelector('#ask-left'), {childList: true, subtree: true});
}"""


def _asked(tab: Page, number: int) -> float:
    """Returns the seconds from the click event on Send to the first character of the answer, in a new talk."""
    tab.locator("#ask-question textarea").fill(_question(number))
    tab.get_by_role("button", name="Send").click()
    tab.locator("#ask-left").get_by_text(re.compile("tokens/s")).wait_for()
    milliseconds: float = tab.evaluate("() => window.answered - window.asked")
    tab.get_by_role("button", name="New talk").click()
    tab.wait_for_function("() => document.querySelectorAll('#ask-left .bot.message').length === 0")
    return milliseconds / 1000


def _direct(url: str, number: int) -> float:
    with openai.OpenAI(base_url=url, api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)) as client:
        client.models.list()  # opens the connection, as the page has one
        began = time.monotonic()
        messages: Any = [{"role": "user", "content": _question(number, "directly")}]
        for chunk in client.chat.completions.create(model="small", messages=messages, max_tokens=8, stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                return time.monotonic() - began
    raise RuntimeError("no answer")


def _question(number: int, way: str = "by the page") -> str:
    return f"Asked {way}: what comes after the number {number}?"  # distinct, so never cached


def _idle(process: psutil.Process, browser: Browser, tab: Page, base: str) -> float:
    """Returns the average number of cores used by the page's processes, with tabs open on all screens."""
    # Each in a context of its own: a browser opens at most six connections per host, and each Gradio page keeps one
    # open.
    state = tab.context.storage_state()
    tabs = [browser.new_context(storage_state=state).new_page() for _ in range(_TABS)]
    for number, one in enumerate(tabs):
        one.goto(f"{base}/{SCREENS[number % len(SCREENS)]}")
        one.wait_for_selector("h1#content")
    tab.wait_for_timeout(10_000)

    def used() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)])

    before, began = used(), time.monotonic()
    tab.wait_for_timeout(_IDLE * 1000)
    return (used() - before) / (time.monotonic() - began)
