"""``llm-ray bench``: measures a deployed model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from llm_ray.cli.options import endpoint_options
from llm_ray.cli.terminal import Terminal


@click.group()
def bench() -> None:
    """Measure an endpoint under load.

    \b
    Example:
      llm-ray bench serve --model_endpoint http://127.0.0.1:8000/v1 --model quickstart --concurrency 16
    """


@bench.command()
@endpoint_options
@click.option(
    "--concurrency", type=click.IntRange(1), help="Concurrent requests, each followed by the next. Default: 16."
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Requests per second on average, sent as a Poisson process, instead of --concurrency.",
)
@click.option("--requests", type=click.IntRange(1), help="Requests to send. Default: 100.")
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    help="Send requests for this many seconds, and wait for the last answers, instead of --requests.",
)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts, in the formats that `llm-ray infer` reads; they are repeated as needed. Default: bundled sentences.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    help="Approximate length of the bundled prompts, without --file. Default: 64.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Maximum tokens per answer.")
@click.option("--ignore-eos", is_flag=True, help="Generate --max-tokens for every answer, if the engine supports it.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0, show_default=True, help="0: always the most likely token."
)
@click.option("--completion", is_flag=True, help="Request completions of raw prompts instead of chats.")
@click.option(
    "--warmup",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Initial requests that are not counted.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bundled prompts and of --rate.")
@click.option("--allow-failures", is_flag=True, help="Exit with code 0 even if requests failed.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write report.json and plot.png into FOLDER.",
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
    prompt_tokens: int | None,
    allow_failures: bool,
    output: Path | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Put load on an endpoint, and measure how fast it answers.

    All requests are streamed, to measure the time to the first token and the time per token as defined by `vllm bench
    serve`. Failed requests are counted, and excluded from all other figures. --concurrency measures capacity, --rate
    latency at a given traffic.

    The load generator is a single-threaded process. Its CPU use is reported, because the endpoint may run on the same
    machine.

    \b
    Examples:
      llm-ray bench serve --model_endpoint http://127.0.0.1:8000/v1 --model quickstart --concurrency 16
      llm-ray bench serve --model_endpoint http://127.0.0.1:8000/v1 --rate 2 --duration 60 --output bench-results/monday
      llm-ray bench serve --model_endpoint http://head:8000/v1 --file prompts.jsonl --max-tokens 256 --json
    """
    from llm_ray.app.ask import find_key, parse
    from llm_ray.app.bench import Load, figures, load_endpoint, table, write
    from llm_ray.errors import ServeError

    if file and prompt_tokens:
        raise click.UsageError("--prompt-tokens applies only to the bundled prompts, not to those of --file")
    how = Load(
        concurrency=16 if concurrency is None and rate is None else concurrency,
        rate=rate,
        requests=100 if requests is None and duration is None else requests,
        duration=duration,
        **load,
    )
    endpoint = parse(url, find_key(api_key, api_key_file, os.environ))
    report = load_endpoint(endpoint, model, how, Terminal(), file=file, prompt_tokens=prompt_tokens or 64)
    click.echo(json.dumps(figures(report), indent=2, ensure_ascii=False) if as_json else "\n".join(table(report)))
    if output:
        write(report, output)
    if report.failures and not allow_failures:
        first = report.failures[0]
        total = len(report.failures) + len(report.samples)
        raise ServeError(
            f"{len(report.failures)} of {total} requests failed, the first after {first.ended:.1f} s: {first.message}"
        )
