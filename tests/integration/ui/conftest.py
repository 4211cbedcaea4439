"""The page in a process of its own, and Debian's Chromium to look at it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from llm_ray.ui.users import Role, add_user

PASSWORD = "several words together"
LLM_RAY = str(Path(sys.executable).with_name("llm-ray"))
ROOT = Path(__file__).parents[3]


class Running:
    """A page's process."""

    def __init__(self, home: Path, command: list[str]) -> None:
        self.home, self._log = home, home / "page.log"
        self._before = (
            self._log.stat().st_size if self._log.exists() else 0
        )  # what an earlier page of this home has said
        # Not more than a person's shell gives it: PYTHONPATH for the checkout that is tested.
        environment = {**os.environ, "LLM_RAY_HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        environment["LLM_RAY_CONVERT_ENV"] = "/nowhere"  # so that engine vllm serves
        with self._log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        self.url = self.urls(1)[0]

    def urls(self, number: int) -> list[str]:
        """The URLs that it has printed, once there are so many."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if len(found := re.findall(r"The page: (\S+)", self.log)) >= number:
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"no page: {self.log}")

    @property
    def log(self) -> str:
        return self._log.read_bytes()[self._before :].decode()

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(by)
        return self.process.wait(30)


@contextlib.contextmanager
def running(home: Path, *command: str) -> Iterator[Running]:
    page = Running(home, [*command])
    try:
        yield page
    finally:
        if page.process.poll() is None:
            page.end()


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for name, role in {"alice": Role.ADMIN, "bob": Role.USER, "eve": Role.VIEWER, "carol": Role.USER}.items():
        add_user(home / "ui" / "users.json", name, PASSWORD, role)
    return home


@pytest.fixture(scope="package")
def page(home: Path) -> Iterator[Running]:
    """The page with the screen of page.py."""
    with running(home, sys.executable, "-m", "tests.integration.ui.page", "0") as page:
        yield page


@pytest.fixture(scope="package")  # until it is stopped, no other test of this process can run an event loop
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=root)
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def open_browser(chromium: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """A browser of its own, as of another person."""
    with contextlib.ExitStack() as contexts:

        def opened(**options: object) -> BrowserContext:
            context = chromium.new_context(**options)
            contexts.callback(context.close)
            return context

        yield opened


@pytest.fixture
def sign_in(open_browser: Callable[..., BrowserContext], page: Running) -> Open:
    """A tab of somebody who has signed in, at a screen."""

    def signed_in(name: str, screen: str = "data", **options: object) -> Page:
        return signed_in_at(open_browser(**options), page, name, screen)

    return signed_in


def signed_in_at(browser: BrowserContext, page: Running, name: str, screen: str) -> Page:
    """A tab of somebody who has signed in, at a screen of a page."""
    tab = browser.new_page()
    fill_in(tab, f"{page.url}/{screen}", name, PASSWORD)
    tab.wait_for_selector("h1#content")
    return tab


def fill_in(tab: Page, url: str, name: str, password: str) -> None:
    tab.goto(url)
    tab.get_by_label("Name").fill(name)
    tab.get_by_label("Password").fill(password)
    tab.get_by_role("button", name="Sign in").click()


def assert_accessible(tab: Page) -> None:
    """No violation that axe finds and that stays: of colours that are just changing it finds contrasts that nobody
    sees."""
    for _ in range(5):
        tab.wait_for_function("document.getAnimations().every(animation => animation.playState !== 'running')")
        found = Axe().run(tab)
        if found.violations_count == 0:
            return
        tab.wait_for_timeout(500)
    raise AssertionError(found.generate_report())
