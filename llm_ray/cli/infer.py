"""``llm-ray infer``: asks a deployed model."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_ray.cli.options import endpoint_options

if TYPE_CHECKING:
    from llm_ray.client.ask import Answer, Settings
    from llm_ray.client.endpoint import Endpoint
    from llm_ray.client.prompts import Prompt
    from llm_ray.console import Reporter

SHOWN_FAILURES = 10


@click.command()
@endpoint_options
@click.option("--prompt", metavar="TEXT|-", help="What to ask. With -, or without --prompt and --file, it is read from standard input.")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ask every prompt in FILE: one a line in .txt; .jsonl, .json and other tables with a column prompt, text, instruction (and input) or messages.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the answers to FILE, a JSON object a line, each as it comes. What FILE answers already is not asked again.",
)
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="With --file: prompts asked at once.")
@click.option("--stream", "--streaming_response", is_flag=True, help="Show the answer as it is written.")
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--completion", is_flag=True, help="Let the model go on with the prompt as it is, without its chat template (OpenAI API).")
@click.option("--max-tokens", "--max_new_tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), help="0: always the likeliest token.")
@click.option("--top-p", "--top_p", type=click.FloatRange(0, 1, min_open=True), help="Choose among the likeliest tokens of this share.")
@click.option("--top-k", "--top_k", type=click.IntRange(1), help="Choose among so many of the likeliest tokens.")
@click.option("--seed", type=int, help="The same seed, prompt and settings give the same answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT. Again for more.")
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
    concurrency: int,
    stream: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Ask a deployed model.

    The URL is an OpenAI API (its path ends in /v1; --model names the model when there are several) or one model's own
    route. Settings that are not given are left to the endpoint.

    An API key is read from the environment, LLM_RAY_API_KEY or OPENAI_API_KEY, or from a file: a key on the command line
    can be read by every user of the machine, and stays in the shell's history. An endpoint that is busy is asked again
    when it says so.

    \b
    Examples:
      llm-ray infer --model_endpoint http://127.0.0.1:8000/v1 --model quickstart --prompt "What is Ray?" --stream
      llm-ray infer --model_endpoint http://127.0.0.1:8000/quickstart --prompt "What is Ray?" --max-tokens 64
      llm-ray infer --model_endpoint http://127.0.0.1:8000/v1 --file questions.txt --output answers.jsonl
      git diff | llm-ray infer --model_endpoint http://127.0.0.1:8000/v1 --system "Review this change."
    """
    import asyncio

    from llm_ray.client.ask import Settings, choose_model
    from llm_ray.client.endpoint import find_key, parse
    from llm_ray.client.prompts import Prompt, read_prompts
    from llm_ray.console import Reporter

    if file and prompt is not None:
        raise click.UsageError("--prompt and --file exclude each other")
    if stream and (file or output or as_json):
        raise click.UsageError("--stream shows one answer on the terminal: not with --file, --output or --json")
    endpoint = parse(url, find_key(api_key, api_key_file))
    how = Settings(**settings, timeout=timeout)
    prompts = read_prompts(file) if file else [Prompt(_typed(prompt))]
    _check(endpoint, how, prompts)
    reporter = Reporter()
    named = asyncio.run(choose_model(endpoint, model, timeout))
    if file or output:
        _ask_all(endpoint, named, how, prompts, concurrency, output, as_json, reporter)
        return
    answer = asyncio.run(_ask(endpoint, named, how, prompts[0], stream, reporter))
    if as_json:
        click.echo(json.dumps(_shown(answer), indent=2, ensure_ascii=False))
    else:
        click.echo("" if stream else answer.text)
    if answer.finish_reason == "length":
        reporter.line("(cut off there: a larger --max-tokens gives more)")


def _typed(prompt: str | None) -> str:
    """The prompt of the command line or of standard input."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("nothing to ask: give --prompt TEXT or --file FILE, or pipe the prompt in")
    try:
        text = sys.stdin.read().strip() if prompt is None or prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise click.UsageError("what standard input gives is not UTF-8") from error
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def _check(endpoint: Endpoint, settings: Settings, prompts: list[Prompt]) -> None:
    if not settings.completion:
        return
    if not endpoint.openai:
        raise click.UsageError(f"--completion: a model's own route has chat alone; give the OpenAI API, {endpoint.base}")
    if settings.system:
        raise click.UsageError("--completion takes the prompt as it is: no --system with it")
    for prompt in prompts:
        if not isinstance(prompt.content, str) or prompt.system:
            raise click.UsageError(f"{prompt.place}: a conversation or a system message, which --completion does not take")


async def _ask(endpoint: Endpoint, model: str, settings: Settings, prompt: Prompt, stream: bool, reporter: Reporter) -> Answer:
    from llm_ray.client.ask import Asker

    def on_wait(seconds: float, error: Exception) -> None:
        reporter.line(f"{error}. Asking again in {seconds:.0f} s")

    def show(text: str) -> None:
        click.echo(text, nl=False)

    async with Asker(endpoint, model, settings, on_wait) as asker:
        return await asker.ask(prompt, show if stream else None)


def _shown(answer: Answer) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(answer), "seconds": round(answer.seconds, 3)}


def _ask_all(
    endpoint: Endpoint,
    model: str,
    settings: Settings,
    prompts: list[Prompt],
    concurrency: int,
    output: Path | None,
    as_json: bool,
    reporter: Reporter,
) -> None:
    """Asks all prompts: answers go to `output`, or in order to standard output."""
    from llm_ray.client.batch import InOrder, answer_all, open_answers
    from llm_ray.errors import ServeError

    shown = sys.stdout  # the bar redirects sys.stdout
    with contextlib.ExitStack() as stack:
        if output:
            answers = stack.enter_context(open_answers(output, prompts, model, settings))
            numbered, keep = answers.open_prompts, answers.keep
            if len(numbered) < len(prompts):
                reporter.line(f"{output} answers {len(prompts) - len(numbered)} of {len(prompts)} prompts already")
        else:
            numbered = list(enumerate(prompts))
            keep = InOrder(shown, settings if as_json else None).keep
        quiet = output is None and shown.isatty()  # there the answers themselves show how far it is
        bar = None if quiet else stack.enter_context(reporter.bar("prompts", len(numbered)))
        try:
            failures = answer_all(endpoint, model, settings, numbered, concurrency, keep, bar)
        except (KeyboardInterrupt, ServeError):
            if output:
                reporter.line(f"{output} keeps the answers that came: the same command goes on from there")
            raise
    if output and as_json:
        click.echo(json.dumps({"output": str(output), "prompts": len(prompts), "asked": len(numbered), "failed": len(failures)}, indent=2))
    if failures:
        first = "".join(f"\n  {prompt.place}: {error}" for prompt, error in failures[:SHOWN_FAILURES])
        more = f"\n  and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
        again = "; the same command asks them again" if output else ""
        raise ServeError(f"{len(failures)} of {len(prompts)} prompts were not answered{again}:{first}{more}")
