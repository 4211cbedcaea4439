"""``llm-ray doctor``: problems of this host and its environment, and how to fix them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

import click

from llm_ray.app.doctor import Finding, worst
from llm_ray.app.doctor import doctor as check
from llm_ray.cli.options import address_option
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.section import home

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command()
@click.option("as_json", "--json", is_flag=True, help="Print JSON: every check with its level, text, fix and values.")
@address_option(
    "Check the nodes of this cluster as well, and compare them: auto on one of its nodes, else its head's GCS. "
    "Default: only this host."
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, address: str | None) -> None:
    """Check this host and its environment, with a fix for each finding.

    Hardware, limits, packages, storage, ports, proxies and the clock; nothing is changed. ok: no action needed; note:
    works, but slower or with fewer features than possible; problem: something will fail. The exit code is 1 only for
    problems.

    \b
    Examples:
      llm-ray doctor
      llm-ray doctor --json
      llm-ray doctor --address auto
    """
    findings = check(home(), os.environ, Terminal(), address)
    if as_json:
        click.echo(json.dumps({"level": worst(findings), "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        _show(findings)
    ctx.exit(1 if worst(findings) == "problem" else 0)


def _show(findings: Sequence[Finding]) -> None:
    width = max(len(one.check) for one in findings)
    for (host, group), of_group in groupby(findings, key=lambda one: (one.host, one.group)):
        members = [*of_group]
        shown = [one for one in members if not host or one.level != "ok"]  # of other nodes, only findings to act on
        click.secho(f"\n{host}: {group}" if host else f"\n{group}", bold=True)
        for one in shown:
            level = click.style(f"{one.level:7}", fg=_COLOURS[one.level])
            click.echo(f"  {level}  {one.check:{width}}  {one.text}")
            if one.fix:
                click.echo(f"  {'':7}  {'':{width}}  {click.style('fix:', bold=True)} {one.fix}")
        if fine := len(members) - len(shown):
            click.echo(f"  {click.style('ok     ', fg=_COLOURS['ok'])}  {fine} of {len(members)} checks")
    counts = [sum(one.level == level for one in findings) for level in ("problem", "note", "ok")]
    click.echo(f"\n{counts[0]} problem(s), {counts[1]} note(s), {counts[2]} ok")
