"""``llm-ray sweep``: searches for the best values of a finetune's keys."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from typing import TYPE_CHECKING

import click

from llm_ray.cli.options import config_options
from llm_ray.cli.runs import table
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.section import home

if TYPE_CHECKING:
    from llm_ray.conf.finetune import FinetuneConf
    from llm_ray.conf.sweep import SweepConf


@click.command()
@config_options
@click.option("--force", is_flag=True, help="Start over, discarding the trials of an earlier sweep of this name.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Start nothing: show the resolved conf, concurrent trials with the cores of each, and time and memory measured "
    "over some steps of one trial.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result (or the dry run) as JSON.")
def sweep(
    config: str,
    overrides: tuple[str, ...],
    vars_files: tuple[str, ...],
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Search for the best values of a finetune's keys, and export the best model.

    The conf names a finetune's conf, the keys to search with their values, and limits. It is YAML or a Jinja template of
    it: a file, or a shipped template's name (lora). The data are prepared once; trials run concurrently, each on its own
    cores, and bad ones are stopped early. The best one is evaluated on rows not used for its selection, and becomes the
    run with the sweep's name.

    Repeat the command to continue an interrupted sweep, or to add trials: completed ones are kept. Ctrl-C stops running
    trials with a checkpoint. On a cluster: --set set.runtime.mode=cluster.

    \b
    Examples:
      llm-ray sweep --config lora --set train=tickets.jsonl --dry-run
      llm-ray sweep --config my-sweep.yaml --set trials=24 --set hours=8
      llm-ray sweep --config my-sweep.yaml --set search.tuning.lora.r.choice=[8,64]
    """
    from llm_ray.conf.load import finetune_of, load_sweep

    if dry_run and force:
        raise click.UsageError("--force does not work with --dry-run, which starts nothing")
    conf = load_sweep(config, overrides, vars_files, home())
    base = finetune_of(conf, home())
    if dry_run:
        _dry_run(conf, base, as_json)
        return
    from llm_ray.app.sweep import draw_curves, run_sweep, sweep_folder

    report = run_sweep(conf, base, Terminal(), force=force)
    folder = sweep_folder(conf, base)
    if as_json:
        click.echo((folder / "report.json").read_text(encoding="utf-8"))
        return
    click.echo(table(report.table()) + "\n")
    color = sys.stdout.isatty()
    if drawn := draw_curves(conf, base, report, min(100, shutil.get_terminal_size((100, 24)).columns), color):
        click.echo(drawn + "\n", color=color)
    if report.importance:
        click.secho("importance of each key", bold=True)
        click.echo("\n".join(f"  {line}" for line in report.importance_lines()) + "\n")
    if lines := report.held_out_lines():
        click.secho("on held-out rows, not used for training or selection", bold=True)
        click.echo("\n".join(f"  {line}" for line in lines) + "\n")
    click.echo(folder)
    click.echo(
        f"The best trial's conf is {folder / 'best.yaml'}; to serve it: llm-ray serve deploy --model {conf.name}",
        err=True,
    )


def _dry_run(conf: SweepConf, base: FinetuneConf, as_json: bool) -> None:
    from llm_ray.app.sweep import plan_sweep
    from llm_ray.conf.load import dump

    plan = plan_sweep(conf, base, Terminal())
    if as_json:
        report = {
            "conf": conf.model_dump(mode="json"),
            "finetune": plan.trial.conf.model_dump(mode="json"),
            "slots": dataclasses.asdict(plan.slots),
            "trials": plan.trials,
            "seconds": plan.seconds,
            "memory": plan.memory,
            "trial": plan.trial.sections,
        }
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    click.echo(dump(conf))
    sections = {"Sweep": plan.lines(conf), **{f"A trial: {name}": lines for name, lines in plan.trial.sections.items()}}
    for title, lines in sections.items():
        if lines:
            click.secho(title, bold=True)
        for line in lines:
            click.echo(f"  {line}")
