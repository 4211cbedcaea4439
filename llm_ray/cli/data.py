"""``llm-ray data``: data as the model will see it, statistics, and data from documents.

llm-ray data preview --config quickstart -n 2
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llm_ray.cli.options import config_options, local_endpoint_options
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.section import home

if TYPE_CHECKING:
    from llm_ray.app.data import Span
    from llm_ray.app.documents import Judged


@click.group()
def data() -> None:
    """Show a conf's data as the model will see it; make data from documents.

    \b
    Examples:
      llm-ray data preview --config lora -n 2
      llm-ray data from-documents handbook --output rows.jsonl
    """


@data.command()
@config_options
@click.option("-n", "--rows", default=3, show_default=True, type=click.IntRange(1), help="Rows to show.")
@click.option(
    "--color/--no-color",
    default=None,
    help="Mark supervised tokens by colour, or by ⟦ ⟧. Default: colour on a terminal.",
)
def preview(
    config: str, overrides: tuple[str, ...], vars_files: tuple[str, ...], rows: int, color: bool | None
) -> None:
    """Show the first rows, with supervised tokens marked.

    \b
    Example:
      llm-ray data preview --config my.yaml.j2 -n 5 --set data.max_length=1024
    """
    from llm_ray.app.data import preview as preview_rows
    from llm_ray.conf.load import load_finetune

    conf = load_finetune(config, overrides, vars_files, home())
    color = sys.stdout.isatty() if color is None else color
    found = preview_rows(conf, rows)
    for row in found.rows:
        click.secho(row.place, bold=True)
        for sequence in row.sequences:
            if sequence.answer:
                click.secho(f"{sequence.answer}:", bold=True)
            click.echo(marked(sequence.spans, color), color=color)
            compared = "compared" if sequence.answer else "supervised"
            click.echo(f"({sequence.tokens} tokens, {sequence.supervised} {compared})")
        if row.dropped:
            click.echo(f"(dropped: {row.dropped}; {row.longest} tokens)")
        elif row.cut:
            click.echo(
                f"(truncated: {row.longest} tokens with the answers that did not fit data.max_length "
                f"{conf.data.max_length})"
            )
        click.echo()
    for note in found.notes:
        click.echo(note, err=True)
    if left_out := found.left_out_line():
        click.echo(left_out)
    click.echo(
        f"format {', '.join(found.formats) or 'unknown'}; supervised tokens are "
        f"{'coloured' if color else 'between ⟦ and ⟧'}"
    )


@data.command()
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stats(config: str, overrides: tuple[str, ...], vars_files: tuple[str, ...], as_json: bool) -> None:
    """Count rows and tokens: supervised, longest, truncated, dropped, and how well packing fills the sequences.

    \b
    Example:
      llm-ray data stats --config lora --set data.packing=false --json
    """
    from llm_ray.app.data import statistics
    from llm_ray.conf.load import load_finetune

    found = statistics(load_finetune(config, overrides, vars_files, home()), Terminal())
    click.echo(found.model_dump_json(indent=2) if as_json else "\n".join(found.lines()))


@data.command("from-documents")
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.jsonl",
    help="File for the rows; held-out rows go to FILE.heldout.jsonl, the model's answers to FILE.jsonl.answers.",
)
@click.option(
    "--preview",
    type=click.IntRange(1),
    metavar="N",
    help="Show the rows of N passages, including dropped ones, and write nothing.",
)
@local_endpoint_options
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1, 20), help="Maximum rows per passage.")
@click.option("--max-passages", type=click.IntRange(1), help="Maximum number of passages. Default: all.")
@click.option(
    "--passage-characters",
    default=2000,
    show_default=True,
    type=click.IntRange(200),
    help="Maximum length of a passage; a token is about 4 characters.",
)
@click.option(
    "--held-out",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the documents whose rows are held out.",
)
@click.option(
    "--support",
    default=0.7,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of an answer's words that must occur in its passage; other rows are dropped.",
)
@click.option("--instructions", default="", metavar="TEXT", help="Additional instructions for the model.")
@click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1), help="Concurrent requests.")
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: always the most likely token."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Maximum tokens per answer. Default: 200 for each of --rows."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def documents(
    folder: Path,
    output: Path | None,
    preview: int | None,
    url: str,
    model: str | None,
    api_key_file: Path | None,
    timeout: float,
    rows: int,
    max_passages: int | None,
    passage_characters: int,
    held_out: float,
    support: float,
    instructions: str,
    concurrency: int,
    temperature: float,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Make questions and answers from text, Markdown, HTML and PDF files.

    A deployed model writes questions and answers about each passage of the documents in FOLDER and its subfolders,
    constrained by a JSON schema. Rows that repeat others or are not supported by their passage are dropped and counted.
    Each row names its document, passage and position. After an interruption, the same command continues with the
    remaining passages.

    The API key is read from LLM_RAY_API_KEY or OPENAI_API_KEY in the environment, or from --api-key-file.

    \b
    Examples:
      llm-ray data from-documents handbook --preview 3
      llm-ray data from-documents handbook --output rows.jsonl --model my-model --held-out 0.2
      llm-ray data preview --config lora --set train=rows.jsonl
    """
    from llm_ray.app.ask import Settings, find_key, parse
    from llm_ray.app.documents import Wanted, from_documents, preview_documents

    if (output is None) == (preview is None):
        raise click.UsageError("give either --output FILE.jsonl or --preview N")
    endpoint = parse(url, find_key(None, api_key_file, os.environ))
    wanted = Wanted(folder, rows, passage_characters, max_passages, support, held_out, instructions, concurrency)
    settings = Settings(max_tokens=max_tokens, temperature=temperature, timeout=timeout)
    if output is None:
        judged, report = preview_documents(endpoint, model, wanted, settings, preview or 1, Terminal())
        if not as_json:
            _show(judged)
    else:
        report = from_documents(endpoint, model, wanted, settings, output, Terminal())
    click.echo(json.dumps(asdict(report), indent=2, default=str) if as_json else "\n".join(report.table()))
    report.check()


def _show(judged: list[Judged]) -> None:
    place = None
    for one in judged:
        if one.row.passage.place != place:
            place = one.row.passage.place
            click.secho(place, bold=True)
        click.echo(f"Q: {one.row.question}\nA: {one.row.answer}")
        if one.dropped:
            click.secho(f"(dropped: {one.dropped})", fg="yellow")
        click.echo()


def marked(spans: Iterable[Span], color: bool) -> str:
    """Returns the text with supervised parts in green or between ⟦ and ⟧."""

    def mark(text: str) -> str:
        return click.style(text, fg="green", bold=True) if color else f"⟦{text}⟧"

    return "".join(mark(span.text) if span.supervised else span.text for span in spans)
