"""``llm-ray data``: the data as the model will see it, and its statistics.

llm-ray data preview --config quickstart -n 2
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from llm_ray.cli.options import config_options
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.section import home

if TYPE_CHECKING:
    from llm_ray.app.data import Span


@click.group()
def data() -> None:
    """Look at the data of a conf as the model will see it.

    \b
    Example:
      llm-ray data preview --config lora -n 2
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
    """Show the first rows as tokens, with the supervised ones marked.

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


def marked(spans: Iterable[Span], color: bool) -> str:
    """The text, its supervised parts green or between ⟦ and ⟧."""

    def mark(text: str) -> str:
        return click.style(text, fg="green", bold=True) if color else f"⟦{text}⟧"

    return "".join(mark(span.text) if span.supervised else span.text for span in spans)
