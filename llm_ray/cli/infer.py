"""``llm-ray infer``: asks a deployed model."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_ray.cli.options import endpoint_options
from llm_ray.cli.terminal import Terminal
from llm_ray.progress import Silent

if TYPE_CHECKING:
    from llm_ray.app.ask import Endpoint, Prompt, Settings


@click.command()
@endpoint_options
@click.option(
    "--prompt",
    metavar="TEXT|-",
    help="The prompt. With -, or without --prompt and --file, it is read from standard input.",
)
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ask every prompt in FILE: one per line in .txt; .jsonl, .json and other tables with a column prompt, text, "
    "instruction (and input) or messages.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the answers to FILE as they come, one JSON object per line. Prompts that FILE already answers are "
    "skipped.",
)
@click.option("--concurrency", type=click.IntRange(1), help="With --file: concurrent requests. Default: 8.")
@click.option("--stream", "--streaming_response", is_flag=True, help="Show the answer as it is generated.")
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option(
    "--completion",
    is_flag=True,
    help="Let the model continue the raw prompt, without its chat template (OpenAI API).",
)
@click.option("--max-tokens", "--max_new_tokens", type=click.IntRange(1), help="Maximum tokens per answer.")
@click.option("--temperature", type=click.FloatRange(0), help="0: always the most likely token.")
@click.option(
    "--top-p",
    "--top_p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most likely tokens with this total probability.",
)
@click.option("--top-k", "--top_k", type=click.IntRange(1), help="Sample from this many of the most likely tokens.")
@click.option("--seed", type=int, help="The same seed, prompt and settings give the same answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT. Repeat for more.")
@click.option("--json", "as_json", is_flag=True, help="Print answers as JSON, with finish_reason, usage and seconds.")
def infer(
    url: str,
    model: str | None,
    api_key: str | None,
    api_key_file: Path | None,
    timeout: float,
    prompt: str | None,
    file: Path | None,
    output: Path | None,
    concurrency: int | None,
    stream: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Ask a deployed model.

    The URL is an OpenAI API (its path ends in /v1; --model selects one of several models) or one model's own route.
    Unset options are left to the endpoint.

    The API key is read from LLM_RAY_API_KEY or OPENAI_API_KEY in the environment, or from a file: a key on the command
    line is visible to every user of the machine and stays in the shell's history. Requests to a busy endpoint are
    repeated after the delay that it requests.

    \b
    Examples:
      llm-ray infer --model_endpoint http://127.0.0.1:8000/v1 --model quickstart --prompt "What is Ray?" --stream
      llm-ray infer --model_endpoint http://127.0.0.1:8000/quickstart --prompt "What is Ray?" --max-tokens 64
      llm-ray infer --model_endpoint http://127.0.0.1:8000/v1 --file questions.txt --output answers.jsonl
      git diff | llm-ray infer --model_endpoint http://127.0.0.1:8000/v1 --system "Review this change."
    """
    import asyncio

    from llm_ray.app.ask import Prompt, Settings, ask, find_key, parse, read_prompts

    if file and prompt is not None:
        raise click.UsageError("--prompt and --file cannot be combined")
    if stream and (file or output or as_json):
        raise click.UsageError(
            "--stream shows one answer on the terminal and cannot be combined with --file, --output or --json"
        )
    if concurrency and not file:
        raise click.UsageError("--concurrency needs --file: without it there is only one prompt")
    endpoint = parse(url, find_key(api_key, api_key_file, os.environ))
    how = Settings(**settings, timeout=timeout)
    prompts = read_prompts(file) if file else [Prompt(_typed(prompt))]
    if file or output:
        _ask_all(endpoint, model, how, prompts, concurrency or 8, output, as_json)
        return
    reporter = Terminal()
    answer = asyncio.run(ask(endpoint, model, prompts[0], how, reporter, _show if stream else None))
    if as_json:
        click.echo(json.dumps({**asdict(answer), "seconds": round(answer.seconds, 3)}, indent=2, ensure_ascii=False))
    else:
        click.echo("" if stream else answer.text)
    if answer.finish_reason == "length":
        reporter.line("(cut off: raise --max-tokens for more)")


def _show(text: str) -> None:
    click.echo(text, nl=False)


def _typed(prompt: str | None) -> str:
    """Returns the prompt from the command line or standard input."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give --prompt TEXT or --file FILE, or pipe it in")
    try:
        text = sys.stdin.read().strip() if prompt is None or prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise click.UsageError("standard input is not UTF-8") from error
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def _ask_all(
    endpoint: Endpoint,
    model: str | None,
    settings: Settings,
    prompts: list[Prompt],
    concurrency: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Asks all prompts; answers go to `output`, or in order to standard output."""
    from llm_ray.app.ask import InOrder, ask_all

    shown = InOrder(sys.stdout, settings if as_json else None)  # created here, before the bar redirects sys.stdout
    quiet = output is None and sys.stdout.isatty()  # on a terminal the answers show progress
    batch = ask_all(
        endpoint,
        model,
        prompts,
        settings,
        Silent() if quiet else Terminal(),
        concurrency=concurrency,
        output=output,
        on_answer=shown.keep,
    )
    if output and as_json:
        summary = {"output": str(output), "prompts": batch.prompts, "asked": batch.asked, "failed": len(batch.failures)}
        click.echo(json.dumps(summary, indent=2))
    batch.check()
