"""Opens every screen of a page and prints its heading: run in a network namespace of its own."""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import sync_playwright

from llm_ray.ui.screens import SCREENS
from tests.integration.ui.conftest import LLM_RAY, PASSWORD, fill_in, running

with running(Path(os.environ["LLM_RAY_HOME"]), LLM_RAY, "ui", "--port", "0") as page, sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    tab = browser.new_page()
    fill_in(tab, f"{page.url}/data", "alice", PASSWORD)
    for screen in SCREENS:
        tab.goto(f"{page.url}/{screen.path}")
        print(tab.locator("h1").inner_text())
    assert "Traceback" not in page.log
    browser.close()
