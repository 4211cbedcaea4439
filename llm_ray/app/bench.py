"""Load test of an endpoint.

report = load_endpoint(parse("http://127.0.0.1:8000/v1"), "support-bot", Load(concurrency=16, requests=100), reporter)
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from llm_ray.bench.load import Load, LoadReport, run_load
from llm_ray.bench.prompts import builtin_prompts
from llm_ray.bench.report import figures, table, write
from llm_ray.client.ask import choose_model
from llm_ray.client.endpoint import Endpoint
from llm_ray.client.prompts import Prompt, read_prompts
from llm_ray.errors import ConfError, DataError
from llm_ray.progress import Reporter

__all__ = ["Load", "LoadReport", "figures", "load_endpoint", "table", "write"]


def load_endpoint(
    endpoint: Endpoint,
    model: str | None,
    load: Load,
    reporter: Reporter,
    *,
    file: Path | None = None,
    prompt_tokens: int = 64,
) -> LoadReport:
    """Load-tests `model` (None: the endpoint's only model) with the prompts of `file`, repeated as needed, or with
    built-in prompts of about `prompt_tokens` tokens.

    Failed requests are recorded in the report. Must not be called from a thread with a running event loop. Raises
    LlmRayError if no request can be sent.
    """
    if not endpoint.openai:
        raise ConfError(
            f"{endpoint.url} is a model's own route: use the OpenAI API, {endpoint.base}, with --model {endpoint.name}"
        )
    prompts = _prompts(file, prompt_tokens, load.seed, load.completion)
    named = asyncio.run(choose_model(endpoint, model, load.timeout))
    whole = load.requests or math.ceil(load.duration or 0)
    with reporter.bar("requests" if load.requests else "seconds", whole) as bar:

        def progress(report: LoadReport) -> None:
            done = len(report.samples) + len(report.failures)
            failed = f", {len(report.failures)} failed" if report.failures else ""
            speed = f"{report.output_tokens_per_second:.0f} tokens/s{failed}"
            bar.update(done if load.requests else min(int(report.seconds), whole), whole, speed)

        return run_load(endpoint, named, prompts, load, progress)


def _prompts(file: Path | None, tokens: int, seed: int, completion: bool) -> Iterator[Prompt]:
    """Yields prompts without end."""
    if not file:
        return builtin_prompts(tokens, seed)
    prompts = read_prompts(file)
    if completion and (turns := next((prompt for prompt in prompts if not isinstance(prompt.content, str)), None)):
        raise DataError(f"{turns.place}: a conversation, which --completion does not accept")
    return itertools.cycle(prompts)
