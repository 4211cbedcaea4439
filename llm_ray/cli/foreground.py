"""Serving in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import threading
from collections.abc import Callable

from llm_ray.progress import Reporter

_WATCH = 1.0  # seconds


def until_interrupted(reporter: Reporter, serves: Callable[[], bool] = lambda: True) -> bool:
    """Waits; returns True on Ctrl-C or SIGTERM (which raises KeyboardInterrupt), False once `serves` returns False."""
    reporter.line("Ctrl-C stops it.")
    never = threading.Event()
    try:
        while serves():
            never.wait(_WATCH)
    except KeyboardInterrupt:
        reporter.line("Stopping.")
        return True
    return False
