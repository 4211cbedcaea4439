"""``llm-ray finetune``: from a conf to a finetuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_ray.cli.options import config_options
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.finetune import STAGES
from llm_ray.conf.section import home
from llm_ray.errors import ConfError

if TYPE_CHECKING:
    from llm_ray.conf.finetune import FinetuneConf


@click.command()
@config_options
@click.option(
    "stages",
    "--stage",
    multiple=True,
    type=click.Choice(STAGES),
    help="Run only this stage instead of the conf's stages. Repeat for more.",
)
@click.option(
    "--resume",
    default="auto",
    metavar="auto|no|PATH",
    show_default=True,
    help="Continue training from the run's last complete checkpoint, start from the beginning, or continue from the "
    "checkpoint PATH.",
)
@click.option(
    "--force", is_flag=True, help="Repeat finished stages, and replace results that a changed conf invalidates."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Start no run: show the resolved conf, data statistics, the values chosen for auto, memory and time measured "
    "over some steps, and warnings.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result (or the dry run) as JSON.")
def finetune(
    config: str,
    overrides: tuple[str, ...],
    vars_files: tuple[str, ...],
    stages: tuple[str, ...],
    resume: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Finetune a model as described by a conf.

    The conf is YAML or a Jinja template of it: a file, or a shipped template's name (quickstart, lora, full, pretrain,
    dpo, cluster). Repeat the command to continue an interrupted run; finished stages are skipped. Ctrl-C stops training
    with a checkpoint, and so does `llm-ray runs stop` from another terminal.

    \b
    Examples:
      llm-ray finetune --config lora --set train=tickets.jsonl --dry-run
      llm-ray finetune --config my.yaml.j2 --set training.epochs=2 --set name=tickets-2
      llm-ray finetune --config my.yaml.j2 --stage evaluate --force
    """
    from llm_ray.conf.load import load_finetune

    if dry_run and (force or resume != "auto"):
        raise click.UsageError(
            f"{'--force' if force else '--resume'} does not work with --dry-run, which starts no run"
        )
    chosen = [f"stages=[{', '.join(s for s in STAGES if s in stages)}]"] if stages else []
    conf = load_finetune(config, [*overrides, *chosen], vars_files, home())
    if dry_run:
        _dry_run(conf, as_json)
        return
    if resume != "auto" and "train" not in conf.stages:
        raise ConfError(
            f"--resume {resume} applies to stage train, which is not among the stages to run ({', '.join(conf.stages)})"
        )
    from llm_ray.app.finetune import run_finetune

    folder = run_finetune(conf, Terminal(), force=force, resume=resume if resume in ("auto", "no") else Path(resume))  # type: ignore[arg-type]
    if as_json:
        click.echo((folder / "result.json").read_text(encoding="utf-8"))
        return
    click.echo(folder)
    if {"export", "convert"} & set(conf.stages):
        engine = " --engine openvino" if "convert" in conf.stages else ""
        click.echo(f"To serve it: llm-ray serve deploy --model {conf.name}{engine}", err=True)


def _dry_run(conf: FinetuneConf, as_json: bool) -> None:
    import dataclasses

    from llm_ray.app.finetune import plan_finetune
    from llm_ray.conf.load import dump

    plan = plan_finetune(conf, Terminal())
    if as_json:
        report: dict[str, Any] = {
            "conf": plan.choice.conf.model_dump(mode="json"),
            "data": plan.data.model_dump(mode="json"),
            "chosen": plan.choice.reasons,
            "estimate": dataclasses.asdict(plan.estimate),
            "warnings": plan.warnings,
            "notes": plan.notes,
        }
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    click.echo(dump(conf))
    sections = {
        "Data": plan.data.lines(),
        "Chosen": plan.choice.lines(),
        "What learns": plan.estimate.learning,
        "Estimate": [*plan.estimate.lines(plan.choice.conf), *plan.notes],
    }
    if plan.converted_bytes is not None:
        size = f"about {plan.converted_bytes / 2**30:.2f} GiB with {conf.convert.weights} weights"
        sections["Estimate"].append(f"the model in OpenVINO form needs {size}")
    for title, lines in sections.items():
        if lines:
            click.secho(title, bold=True)
        for line in lines:
            click.echo(f"  {line}")
    if plan.warnings:
        click.secho("Warnings", bold=True, fg="yellow")
        for line in plan.warnings:
            click.echo(f"  {line}")
