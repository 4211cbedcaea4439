"""``llm-ray status``: the cluster, its jobs, and the served models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from llm_ray.cli.options import address_option
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.section import home


@click.command()
@click.option("as_json", "--json", is_flag=True, help="Print JSON.")
@address_option("The cluster: auto on one of its nodes, else its head's GCS. Default: what this machine serves.")
def status(as_json: bool, address: str | None) -> None:
    """Show nodes with their resources, running jobs, and deployed models.

    \b
    Examples:
      llm-ray status
      llm-ray status --address 10.0.0.1:6379 --json
    """
    from llm_ray.app.cluster import cluster_state

    found = cluster_state(home(), Terminal(), address)
    if found is None:
        click.echo(
            json.dumps({"nodes": [], "jobs": [], "applications": []})
            if as_json
            else "llm-ray runs no Ray on this machine. On a node of a cluster, use --address auto."
        )
        return
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    _show(
        "Nodes",
        found["nodes"],
        ("host", "address", "head", "draining", "cpus", "cpus_used", "memory_gib", "memory_gib_used"),
    )
    _show("Jobs", found["jobs"], ("id", "status", "since", "command"))
    _show("Served", found["applications"], ("name", "status", "replicas", "message"))


def _show(title: str, rows: Sequence[Mapping[str, Any]], columns: tuple[str, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 160
    if not rows:
        console.print(f"{title}: none")
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console.print(table)


def _text(value: Any) -> str:
    return {True: "yes", False: "", None: ""}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
