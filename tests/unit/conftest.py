"""Shared by the unit tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """`engine: auto` converts models where it can. Here it cannot: tests of conversion bring a tool of their own."""
    monkeypatch.setenv("LLM_RAY_CONVERT_ENV", "/nowhere")
