"""Serving in the foreground: until Ctrl-C or SIGTERM."""

from __future__ import annotations

import threading

from llm_ray.console import Reporter


def until_interrupted(reporter: Reporter) -> None:
    """Return at Ctrl-C or SIGTERM (which comes as KeyboardInterrupt)."""
    reporter.line("Ctrl-C stops it.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        reporter.line("Stopping.")
