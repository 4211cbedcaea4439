"""``llm-ray data``: what the model will see of the data, and the figures of it.

llm-ray data preview --config quickstart -n 2
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from llm_ray.cli.options import config_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_ray.conf.schema import FinetuneConf
    from llm_ray.data.encode import Sequence


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
@click.option("--color/--no-color", default=None, help="Mark supervised tokens by colour, or by ⟦ ⟧. Default: colour on a terminal.")
def preview(config: str, overrides: tuple[str, ...], vars_files: tuple[str, ...], rows: int, color: bool | None) -> None:
    """Show the first rows as tokens; those that are supervised are marked.

    \b
    Example:
      llm-ray data preview --config my.yaml.j2 -n 5 --set data.max_length=1024
    """
    from llm_ray.data.prepare import NO_ANSWER, TOO_LONG, Tally, encode_rows

    conf, tokenizer = _load(config, overrides, vars_files)
    color = sys.stdout.isatty() if color is None else color
    tally = Tally(fail=conf.data.on_bad_row == "fail")
    few = conf.model_copy(update={"data": conf.data.model_copy(update={"max_rows": rows})})
    for prepared in encode_rows(few, tokenizer, conf.data.train, tally):
        click.secho(prepared.row.place, bold=True)
        for sequence in prepared.encoded.sequences:
            supervised = sum(label >= 0 for label in sequence.labels)
            click.echo(marked(tokenizer, sequence, color), color=color)
            click.echo(f"({len(sequence.input_ids)} tokens, {supervised} supervised)")
        if not prepared.encoded.sequences:
            click.echo(f"(dropped: {TOO_LONG if prepared.encoded.truncated else NO_ANSWER}; {prepared.encoded.longest} tokens)")
        elif prepared.encoded.truncated:
            click.echo(
                f"(cut: with the answers that did not fit data.max_length {conf.data.max_length}, {prepared.encoded.longest} tokens)"
            )
        click.echo()
    if not tally.read:
        click.echo("no rows")
    for example in tally.examples:
        if example.startswith("skipped"):
            click.echo(example, err=True)
    click.echo(f"format {', '.join(tally.formats) or 'unknown'}; supervised tokens are {'coloured' if color else 'between ⟦ and ⟧'}")


@data.command()
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stats(config: str, overrides: tuple[str, ...], vars_files: tuple[str, ...], as_json: bool) -> None:
    """Count rows and tokens: supervised, longest, truncated, dropped, and how well packing fills the sequences.

    \b
    Example:
      llm-ray data stats --config lora --set data.packing=false --json
    """
    from llm_ray.data.prepare import statistics

    conf, tokenizer = _load(config, overrides, vars_files)
    found = statistics(conf, tokenizer, report=lambda line: click.echo(line, err=True))
    click.echo(found.model_dump_json(indent=2) if as_json else "\n".join(found.lines()))


def marked(tokenizer: PreTrainedTokenizerBase, sequence: Sequence, color: bool) -> str:
    """The sequence as text, special tokens visible, with its supervised tokens green or between ⟦ and ⟧."""
    pieces = []
    start = 0
    supervised = [label >= 0 for label in sequence.labels]
    for end in range(1, len(supervised) + 1):
        # Whole runs are decoded: a character may be spread over several tokens.
        if end == len(supervised) or supervised[end] != supervised[start]:
            text = tokenizer.decode(sequence.input_ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if supervised[start]:
                text = click.style(text, fg="green", bold=True) if color else f"⟦{text}⟧"
            pieces.append(text)
            start = end
    return "".join(pieces)


def _load(config: str, overrides: tuple[str, ...], vars_files: tuple[str, ...]) -> tuple[FinetuneConf, PreTrainedTokenizerBase]:
    from llm_ray.conf.load import load_finetune
    from llm_ray.models.load import load_tokenizer

    conf = load_finetune(config, overrides, vars_files)
    return conf, load_tokenizer(conf.model, conf.paths)
