"""``llm-ray jobs``: finetunes in the background of this machine, one at a time.

llm-ray jobs submit --config lora --set train=tickets.jsonl --set name=support-bot
llm-ray jobs follow support-bot
"""

from __future__ import annotations

import getpass
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llm_ray.cli.options import config_options
from llm_ray.cli.runs import folder_of, folder_option, json_option, table
from llm_ray.conf.section import home

if TYPE_CHECKING:
    from llm_ray.app.job_list import JobSummary
    from llm_ray.app.jobs import Job


@click.group()
def jobs() -> None:
    """Finetune in the background of this machine: submit, list, show, follow, cancel, resume and recover.

    One finetune runs at a time, in order of arrival; the web page and the fine-tuning API use the same queue. A job
    outlives the terminal.

    \b
    Examples:
      llm-ray jobs submit --config lora --set train=tickets.jsonl --set name=support-bot
      llm-ray jobs list
      llm-ray jobs follow support-bot
    """


@jobs.command()
@config_options
@json_option
def submit(config: str, overrides: tuple[str, ...], vars_files: tuple[str, ...], as_json: bool) -> None:
    """Queue a finetune. The options are those of llm-ray finetune.

    \b
    Example:
      llm-ray jobs submit --config lora --set train=tickets.jsonl --set name=support-bot
    """
    from llm_ray.app import jobs as queue
    from llm_ray.conf.load import load_finetune

    conf = load_finetune(config, overrides, vars_files, home())
    given = [("--config", config), *(("--set", one) for one in overrides), *(("--vars", one) for one in vars_files)]
    command = shlex.join(["llm-ray", "finetune", *(word for option in given for word in option)])
    job = queue.submit(conf, by=getpass.getuser(), command=command)
    if as_json:
        click.echo(json.dumps(vars(job), indent=2))
        return
    click.echo(_standing(job))
    click.echo(f"To watch it: llm-ray jobs follow {job.name}", err=True)


@jobs.command("list")
@folder_option
@json_option
def list_(folder: Path | None, as_json: bool) -> None:
    """List the jobs: running, waiting in order, and ended, latest first.

    \b
    Example:
      llm-ray jobs list --json
    """
    from llm_ray.app.job_list import overview
    from llm_ray.app.runs import age

    found = overview(folder_of(folder))
    if as_json:
        click.echo(json.dumps([vars(job) for job in found], indent=2))
    elif not found:
        click.echo(f"no jobs in {folder_of(folder)}: submit one with llm-ray jobs submit")
    else:
        rows = [(job.name, job.state, job.ahead or "", job.by, age(job.since), job.reason) for job in found]
        click.echo(table([("name", "state", "ahead", "by", "age", "reason"), *rows]))


@jobs.command()
@click.argument("name")
@folder_option
@json_option
def show(name: str, folder: Path | None, as_json: bool) -> None:
    """Show a job and the last lines of its log.

    \b
    Example:
      llm-ray jobs show support-bot
    """
    from llm_ray.app.job_list import find
    from llm_ray.app.jobs import read_log

    job, log = find(folder_of(folder), name), read_log(folder_of(folder), name, 4096)
    if as_json:
        click.echo(json.dumps(vars(job) | {"log": log}, indent=2))
        return
    click.secho(_standing(job), bold=True)
    for line in (job.reason, f"submitted {job.since}{f' by {job.by}' if job.by else ''}"):
        if line:
            click.echo(line)
    if log:
        click.echo(f"\n{log.rstrip()}")


@jobs.command()
@click.argument("name")
@folder_option
@click.pass_context
def follow(context: click.Context, name: str, folder: Path | None) -> None:
    """Print a job's log as it grows, until the job ends. Ctrl-C stops the printing, not the job.

    The exit code is 0 if the job is done, else 1.

    \b
    Example:
      llm-ray jobs follow support-bot
    """
    from llm_ray.app.job_list import find, log_of

    for text in log_of(folder_of(folder), name):
        click.echo(text, nl=False)
    job = find(folder_of(folder), name)
    click.echo(f"{name}: {job.state}{f'. {job.reason}' if job.reason else ''}", err=True)
    context.exit(0 if job.state == "done" else 1)


@jobs.command()
@click.argument("name")
@folder_option
def cancel(name: str, folder: Path | None) -> None:
    """Remove a job from the queue; a running one stops after its step with a checkpoint, and can be resumed.

    \b
    Example:
      llm-ray jobs cancel support-bot
    """
    from llm_ray.app.job_list import end

    click.echo(f"{name}: {end(folder_of(folder), name)}")


@jobs.command()
@click.argument("name")
@folder_option
def resume(name: str, folder: Path | None) -> None:
    """Queue a cancelled, interrupted or failed run again; it continues from its last checkpoint.

    \b
    Example:
      llm-ray jobs resume support-bot
    """
    from llm_ray.app.jobs import resume as again
    from llm_ray.app.runs import find_run

    runs = folder_of(folder)
    find_run(runs, name)
    job = again(runs, name, by=getpass.getuser())
    click.echo(f"{name}: {job.state}")


@jobs.command()
@folder_option
def recover(folder: Path | None) -> None:
    """After a restart of the machine, continue the jobs that it interrupted, in their order in the queue.

    The web page does the same when it starts. Jobs that were interrupted otherwise need jobs resume.

    \b
    Example:
      llm-ray jobs recover
    """
    from llm_ray.app.jobs import recover as begin

    begun = begin(folder_of(folder))
    click.echo(f"continued: {', '.join(begun)}" if begun else "no job was interrupted by a restart of this machine")


def _standing(job: Job | JobSummary) -> str:
    behind = f", after {job.ahead} other{'s' if job.ahead > 1 else ''}" if job.ahead else ""
    return f"{job.name}: {job.state}{behind}"
