"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(met: Callable[[], object], what: str = "what was waited for", timeout: float = 420) -> None:
    """Returns when it is met. Raises AssertionError, with what was waited for, after `timeout` seconds."""
    began = time.monotonic()
    while not met():
        assert time.monotonic() - began < timeout, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.1)
