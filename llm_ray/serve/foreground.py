"""Serving in the foreground: an endpoint that lives until Ctrl-C."""

from __future__ import annotations

import json
import threading

from llm_ray.console import Reporter


def serve_until_interrupted(url: str, model: str, reporter: Reporter) -> None:
    """Say where `model` answers and how to ask it; return at Ctrl-C or SIGTERM (as KeyboardInterrupt)."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    reporter.line(f"Ready at {url} (OpenAI API). Try:", style="bold")
    reporter.line(f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    reporter.line("Ctrl-C stops it.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        reporter.line("Stopping.")
