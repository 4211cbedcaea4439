"""``llm-ray runs``: list, show, compare, stop and delete runs.

llm-ray runs compare lora-r8 lora-r16 --png loss.png
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from llm_ray.conf.section import home

folder_option = click.option(
    "--runs",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder of runs (paths.runs of the conf). Default: $LLM_RAY_HOME/runs.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def runs() -> None:
    """List, show, compare, stop and delete runs.

    \b
    Examples:
      llm-ray runs list
      llm-ray runs show quickstart
      llm-ray runs compare lora-r8 lora-r16 --png loss.png
      llm-ray runs stop quickstart
    """


@runs.command("list")
@folder_option
@json_option
def list_(folder: Path | None, as_json: bool) -> None:
    """List the runs, latest first, with their state and last metrics.

    The process of an `interrupted` run is gone: repeat its finetune command to continue it.

    \b
    Example:
      llm-ray runs list --json
    """
    from llm_ray.app.runs import age, list_runs

    found = list_runs(folder_of(folder))
    if as_json:
        _print_json([vars(run) for run in found])
    elif not found:
        click.echo(f"no runs in {folder_of(folder)}: start one with llm-ray finetune")
    else:
        head = ("name", "state", "base", "method", "steps", "loss", "validation", "tokens/s", "age")
        lines = [
            (
                run.name,
                run.state,
                Path(run.base).name if run.base and run.base.startswith("/") else run.base,
                run.method,
                f"{run.step}/{run.total_steps}" if run.total_steps else "",
                run.loss,
                run.validation_loss,
                run.tokens_per_second,
                age(run.created),
            )
            for run in found
        ]
        click.echo(table([head, *lines]))


@runs.command()
@click.argument("name")
@folder_option
@json_option
def show(name: str, folder: Path | None, as_json: bool) -> None:
    """Show a run: conf, stages, metrics, evaluation, output, lineage.

    \b
    Example:
      llm-ray runs show quickstart
    """
    from llm_ray.app.runs import label, show_run, whole

    details = show_run(folder_of(folder), name)
    run, conf, lineage, result = details.summary, details.conf, details.lineage, details.result
    if as_json:
        output = str(details.output) if details.output else None
        _print_json({**vars(run), "output": output, "conf": conf, "lineage": lineage, "result": result})
        return
    model, data, tuning, training = conf["model"], conf["data"], conf["tuning"], conf["training"]
    training |= {key: details.params[key] for key in training if key in details.params}  # values chosen for auto
    click.secho(f"{name}: {run.state}", bold=True)
    if run.reason:
        click.echo(run.reason)
    _section("conf", _conf_lines(model, data, tuning, training, conf["runtime"]))
    _section("stages", _stage_lines(conf["stages"], lineage.get("stages", {})))
    figures = {
        "steps": f"{run.step} of {run.total_steps}" if run.total_steps else None,
        "loss": run.loss,
        "validation loss": run.validation_loss,
        "tokens/s": run.tokens_per_second,
    }
    _section("metrics", figures.items())
    evaluation = result.get("evaluation", {})
    if evaluation.get("base") or evaluation.get("tasks"):
        click.secho("\nevaluation", bold=True)
        base, finetuned = evaluation["base"], evaluation["finetuned"]  # rewards compare the two: one side has them
        rows = [
            (key.replace("_", " "), base.get(key), finetuned.get(key)) for key in dict.fromkeys([*base, *finetuned])
        ]
        rows += [(label(row), row["base"], row["finetuned"]) for row in whole(evaluation.get("tasks", []))]
        click.echo(table([("", "base", "finetuned"), *rows], indent="  "))
    git = lineage.get("git")
    _section(
        "lineage",
        [
            ("created", lineage.get("created")),
            ("command", lineage.get("command")),
            ("conf", f"{Path(run.path) / 'conf.yaml'} (sha256 {lineage.get('conf_sha256', '')[:12]})"),
            *(("data", _file_line(entry)) for entry in lineage.get("data", {}).get("train", [])),
            ("model", lineage.get("model", {}).get("fingerprint", "")[:12] or None),
            (
                "versions",
                ", ".join(f"{package} {number}" for package, number in lineage.get("versions", {}).items() if number),
            ),
            ("hosts", ", ".join(lineage.get("hosts", []))),
            ("git", git and f"{git['commit'][:12]}{', changed' if git['dirty'] else ''}"),
        ],
    )
    _section("output", [("folder", run.path), ("model", details.output)])


@runs.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME NAME…")
@click.option("--metric", default="loss", show_default=True, help="The column of metrics.jsonl to plot.")
@click.option(
    "--png", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Also write the plot to a PNG."
)
@folder_option
@json_option
def compare(names: tuple[str, ...], metric: str, png: Path | None, folder: Path | None, as_json: bool) -> None:
    """Compare runs: the differences between their confs, their results, and their curves.

    \b
    Example:
      llm-ray runs compare lora-r8 lora-r16 --metric validation_loss --png loss.png
    """
    from llm_ray.app.runs import compare_runs, png_plot, terminal_plot

    if len(set(names)) < 2:
        raise click.UsageError("name at least two runs to compare")
    found = compare_runs(folder_of(folder), names, metric)
    if png:
        png_plot(found, png)
        click.echo(f"the plot is in {png}", err=True)
    if as_json:
        _print_json(vars(found))
        return
    tables = [("conf", found.conf), ("figures", found.figures)]
    for title, values in tables:
        if values:
            click.echo(table([(title, *found.runs), *((key, *of_runs) for key, of_runs in values.items())]) + "\n")
    if not found.conf:
        click.echo("the confs are the same\n")
    color = sys.stdout.isatty()
    click.echo(terminal_plot(found, min(100, shutil.get_terminal_size((100, 24)).columns), color=color), color=color)


@runs.command()
@click.argument("name")
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="Wait this long for it to end. Default: do not wait.",
)
@folder_option
@json_option
def stop(name: str, wait: float, folder: Path | None, as_json: bool) -> None:
    """Stop a running finetune from another terminal or host; its finetune command continues it later.

    Training stops after the current step, with a checkpoint. Any other stage is completed first.

    \b
    Examples:
      llm-ray runs stop support-bot
      llm-ray runs stop support-bot --wait 600
    """
    from llm_ray.app.runs import stop_run

    run = stop_run(folder_of(folder), name, wait)
    if as_json:
        _print_json(vars(run))
    elif run.state == "running":
        click.echo(f"{name} is stopping: check with llm-ray runs show {name}")
    else:
        click.echo(f"{name}: {run.state}. {run.reason}".rstrip())


@runs.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@folder_option
def delete(name: str, yes: bool, folder: Path | None) -> None:
    """Delete a run with its checkpoints, metrics and model, unless it is running.

    \b
    Example:
      llm-ray runs delete first-try
    """
    from llm_ray.app.runs import delete_run, find_run

    path = find_run(folder_of(folder), name)
    if not yes:
        click.confirm(f"Delete {path} with its checkpoints and model?", abort=True, err=True)
    delete_run(folder_of(folder), name)
    click.echo(f"{path} is deleted", err=True)


def folder_of(folder: Path | None) -> Path:
    """Returns the runs' folder of the option --runs."""
    return folder.expanduser().absolute() if folder else home() / "runs"


def _conf_lines(
    model: dict[str, Any],
    data: dict[str, Any],
    tuning: dict[str, Any],
    training: dict[str, Any],
    runtime: dict[str, Any],
) -> list[tuple[str, object]]:
    rank = f" r {tuning['lora']['r']}" if tuning["method"] == "lora" else ""
    validation = data["validation"]
    length = f"{training['max_steps']} steps" if training["max_steps"] else f"{training['epochs']} epochs"
    return [
        ("base", model["base"]),
        ("train", ", ".join(data["train"])),
        ("validation", ", ".join(validation) if isinstance(validation, list) else validation),
        ("tuning", f"{tuning['objective']}, {tuning['method']}{rank}"),
        ("training", f"{length}, {training['global_batch_size']} rows per step, {runtime['workers']} worker(s)"),
        ("learning rate", f"{training['learning_rate']}, {training['schedule']}"),
    ]


def _stage_lines(stages: Sequence[str], marks: dict[str, dict[str, Any]]) -> list[tuple[str, object]]:
    def words(mark: dict[str, Any]) -> str:
        if "finished" in mark:
            return f"done {mark['finished']}, in {mark['seconds']:.0f} s"
        return f"started {mark['began']}, not finished" if mark else "not done"

    return [(stage, words(marks.get(stage, {}))) for stage in dict.fromkeys([*stages, *marks])]


def _file_line(entry: dict[str, Any]) -> str:
    return entry.get("hub") or f"{entry['path']} ({entry['bytes']} bytes, sha256 {entry['sha256'][:12]})"


def _section(title: str, lines: Iterable[tuple[str, object]]) -> None:
    shown = [(key, value) for key, value in lines if value not in (None, "")]
    if shown:
        click.secho(f"\n{title}", bold=True)
        click.echo(table(shown, indent="  "))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict, bool)) else str(value)


def table(rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Formats rows as left-aligned columns."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
