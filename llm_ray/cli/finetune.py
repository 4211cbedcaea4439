"""``llm-ray finetune``: from a conf to a finetuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_ray.cli.options import config_options
from llm_ray.conf.schema import STAGES

if TYPE_CHECKING:
    from llm_ray.conf.schema import FinetuneConf


@click.command()
@config_options
@click.option(
    "stages", "--stage", multiple=True, type=click.Choice(STAGES), help="Run this stage only, instead of the conf's stages. Again for more."
)
@click.option(
    "--resume",
    default="auto",
    metavar="auto|no|PATH",
    show_default=True,
    help="Train on from the run's last whole checkpoint, from the start, or from the checkpoint PATH.",
)
@click.option("--force", is_flag=True, help="Repeat stages that are done, and let a changed conf replace what depends on it.")
@click.option(
    "--dry-run", is_flag=True, help="Start nothing: show the resolved conf, the data's statistics, and an estimate of memory and time."
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
    """Finetune a model as a conf says.

    The conf is a Jinja template of YAML, or plain YAML: a file, or a shipped template's name (quickstart, lora, full,
    pretrain, cluster). The same command again goes on where the run was broken off, and skips what is done. Ctrl-C ends
    training with a checkpoint.

    \b
    Examples:
      llm-ray finetune --config lora --set train=tickets.jsonl --dry-run
      llm-ray finetune --config my.yaml.j2 --set training.epochs=2 --set name=tickets-2
      llm-ray finetune --config my.yaml.j2 --stage evaluate --force
    """
    from llm_ray.conf.load import load_finetune

    chosen = [f"stages=[{', '.join(s for s in STAGES if s in stages)}]"] if stages else []
    conf = load_finetune(config, [*overrides, *chosen], vars_files)
    if dry_run:
        _dry_run(conf, as_json)
        return
    from llm_ray.pipeline import run_finetune

    folder = run_finetune(conf, force=force, resume=resume if resume in ("auto", "no") else Path(resume))  # type: ignore[arg-type]
    if as_json:
        click.echo((folder / "result.json").read_text(encoding="utf-8"))
        return
    click.echo(folder)
    if {"export", "convert"} & set(conf.stages):
        engine = " --engine openvino" if "convert" in conf.stages else ""
        click.echo(f"To serve it: llm-ray serve deploy --model {conf.name}{engine}", err=True)


def _dry_run(conf: FinetuneConf, as_json: bool) -> None:
    import dataclasses

    from llm_ray.cluster import check_resources, host_cluster, ray_session
    from llm_ray.conf.load import dump
    from llm_ray.data.prepare import statistics
    from llm_ray.models.convert import check_environment, size_on_disk
    from llm_ray.models.load import load_tokenizer
    from llm_ray.train.estimate import estimate

    if conf.runtime.mode == "local":
        cpus = check_resources(conf.runtime, host_cluster())
    else:
        with ray_session(conf.runtime) as cluster:
            cpus = check_resources(conf.runtime, cluster)
    stats = statistics(conf, load_tokenizer(conf.model, conf.paths))
    guess = estimate(conf, stats, cpus)
    if "convert" in conf.stages:
        check_environment()
    if as_json:
        report: dict[str, Any] = {
            "conf": conf.model_dump(mode="json"),
            "data": stats.model_dump(mode="json"),
            "estimate": dataclasses.asdict(guess),
        }
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    click.echo(dump(conf))
    click.secho("Data", bold=True)
    for line in stats.lines():
        click.echo(f"  {line}")
    click.secho("Estimate", bold=True)
    for line in guess.lines(conf):
        click.echo(f"  {line}")
    if "convert" in conf.stages:
        weights = conf.convert.weights
        click.echo(
            f"  the model in OpenVINO form takes about {size_on_disk(guess.parameters, weights) / 2**30:.2f} GiB with {weights} weights"
        )
