"""``llm-ray bench``: measures what is deployed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_ray.cli.options import endpoint_options

if TYPE_CHECKING:
    from llm_ray.client.prompts import Prompt


@click.group()
def bench() -> None:
    """Measure an endpoint under load.

    \b
    Example:
      llm-ray bench serve --model_endpoint http://127.0.0.1:8000/v1 --model quickstart --concurrency 16
    """


@bench.command()
@endpoint_options
@click.option("--concurrency", type=click.IntRange(1), help="Requests at once, each sent when another is answered. Default: 16.")
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Requests per second on average, at the times of a Poisson process instead."
)
@click.option("--requests", type=click.IntRange(1), help="Requests to send. Default: 100.")
@click.option(
    "--duration", type=click.FloatRange(0, min_open=True), help="Send requests for so many seconds instead, and wait for the last answers."
)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts, as `llm-ray infer` reads them; they are gone through again and again. Default: sentences that ship.",
)
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="About how long prompts are, when --file is not given."
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer.")
@click.option("--ignore-eos", is_flag=True, help="Let every answer become so long, where the engine can.")
@click.option("--temperature", type=click.FloatRange(0), default=0, show_default=True, help="0: always the likeliest token.")
@click.option("--completion", is_flag=True, help="Ask for completions of raw prompts in place of chats.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Requests sent before, which are in no figure.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts that ship and the times of --rate.")
@click.option("--allow-failures", is_flag=True, help="End with code 0 even when requests failed.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write report.json and plot.png into FOLDER."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def serve(
    url: str,
    model: str | None,
    api_key: str | None,
    api_key_file: Path | None,
    concurrency: int | None,
    rate: float | None,
    requests: int | None,
    duration: float | None,
    file: Path | None,
    prompt_tokens: int,
    allow_failures: bool,
    output: Path | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Load an endpoint, and measure how fast it answers.

    Every request is a stream, so that the time to the first token and the time per token are measured, as `vllm bench
    serve` defines them. A request that fails counts as a failure and is in no other figure. --concurrency tells what the
    endpoint can do, --rate how it feels when so many people use it.

    The load runs in one process of one thread; what it needs of the CPU is reported, because the endpoint may run on the
    same machine.

    \b
    Examples:
      llm-ray bench serve --model_endpoint http://127.0.0.1:8000/v1 --model quickstart --concurrency 16
      llm-ray bench serve --model_endpoint http://127.0.0.1:8000/v1 --rate 2 --duration 60 --output bench-results/monday
      llm-ray bench serve --model_endpoint http://head:8000/v1 --file prompts.jsonl --max-tokens 256 --json
    """
    import asyncio

    from llm_ray.bench.load import Load, LoadReport, run_load
    from llm_ray.bench.report import figures, table, write
    from llm_ray.client.ask import choose_model
    from llm_ray.client.endpoint import find_key, parse
    from llm_ray.console import Reporter
    from llm_ray.errors import ConfError, ServeError

    how = Load(
        concurrency=16 if concurrency is None and rate is None else concurrency,
        rate=rate,
        requests=100 if requests is None and duration is None else requests,
        duration=duration,
        **load,
    )
    endpoint = parse(url, find_key(api_key, api_key_file))
    if not endpoint.openai:
        raise ConfError(f"{endpoint.url} is a model's own route: give the OpenAI API, {endpoint.base}, with --model {endpoint.name}")
    prompts = _prompts(file, prompt_tokens, how.seed, how.completion)
    named = asyncio.run(choose_model(endpoint, model, how.timeout))
    whole = how.requests or math.ceil(how.duration or 0)
    with Reporter().bar("requests" if how.requests else "seconds", whole) as bar:

        def progress(report: LoadReport) -> None:
            done = len(report.samples) + len(report.failures)
            failed = f", {len(report.failures)} failed" if report.failures else ""
            speed = f"{report.output_tokens_per_second:.0f} tokens/s{failed}"
            bar.update(done if how.requests else min(int(report.seconds), whole), whole, speed)

        report = run_load(endpoint, named, prompts, how, progress)
    click.echo(json.dumps(figures(report), indent=2, ensure_ascii=False) if as_json else "\n".join(table(report)))
    if output:
        write(report, output)
    if report.failures and not allow_failures:
        first = report.failures[0]
        total = len(report.failures) + len(report.samples)
        raise ServeError(f"{len(report.failures)} of {total} requests failed, the first after {first.ended:.1f} s: {first.message}")


def _prompts(file: Path | None, tokens: int, seed: int, completion: bool) -> Iterator[Prompt]:
    """Prompts without end."""
    from llm_ray.bench.prompts import builtin_prompts
    from llm_ray.client.prompts import read_prompts
    from llm_ray.errors import DataError

    if not file:
        return builtin_prompts(tokens, seed)
    prompts = read_prompts(file)
    if completion and (turns := next((prompt for prompt in prompts if not isinstance(prompt.content, str)), None)):
        raise DataError(f"{turns.place}: a conversation, which --completion does not take")
    return itertools.cycle(prompts)
