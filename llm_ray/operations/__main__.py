"""Runs on the head, as Ray's user, with Ray's environment (/etc/llm-ray/ray.env); prints the answer as JSON to standard
output.

python -m llm_ray.operations state
python -m llm_ray.operations check --nodes '{"head": "10.0.0.11", "worker1": "10.0.0.12"}' --folder /srv/llm-ray/runs
python -m llm_ray.operations train --workers 2 --folder /srv/llm-ray/runs
python -m llm_ray.operations serve --host 127.0.0.1 --port 8000
python -m llm_ray.operations ask --model support-bot --prompt "Who are you?"
python -m llm_ray.operations drain --address 10.0.0.12 --seconds 600
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llm_ray.cluster import join_cluster
from llm_ray.errors import LlmRayError
from llm_ray.operations import ask, checks, drain, smoke, state


def _answer(work: Callable[[], Any]) -> None:
    """Prints the result of `work`, or {"error": …} with exit code 1. Ray's output goes to standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr), join_cluster(os.environ.get("RAY_ADDRESS", "auto")):
            result = work()
    except LlmRayError as error:
        click.echo(json.dumps({"error": str(error)}))
        sys.exit(1)
    click.echo(json.dumps(result))


@click.group()
def main() -> None:
    """What the playbooks ask of a running cluster."""


@main.command("state")
def state_() -> None:
    """Nodes, jobs, and what is served."""
    _answer(state.state)


@main.command()
@click.option("--nodes", required=True, help="JSON: address of each host of the inventory, by its name there.")
@click.option(
    "--folder", required=True, type=click.Path(path_type=Path), help="Folder on the shared storage to write in."
)
def check(nodes: str, folder: Path) -> None:
    """Nodes alive against the inventory, a task on each, versions, and the shared storage written by each and read by
    all."""
    _answer(lambda: checks.check(json.loads(nodes), folder))


@main.command()
@click.option("--workers", required=True, type=int)
@click.option(
    "--folder", required=True, type=click.Path(path_type=Path), help="Folder on the shared storage to write in."
)
def train(workers: int, folder: Path) -> None:
    """One step of training over all nodes."""
    _answer(lambda: smoke.train(workers, folder))


@main.command()
@click.option("--host", required=True)
@click.option("--port", required=True, type=int)
def serve(host: str, port: int) -> None:
    """A tiny application is served, answers, and is gone."""
    _answer(lambda: smoke.serve(host, port))


@main.command("ask")
@click.option("--model", required=True, help="A model that is served.")
@click.option("--prompt", required=True)
@click.option("--seconds", default=300.0, help="How long the answer may take.")
def ask_(model: str, prompt: str, seconds: float) -> None:
    """A served model is asked a question through the endpoint, with a key of its own that ends with it."""
    _answer(lambda: ask.ask(model, prompt, seconds))


@main.command("drain")
@click.option("--address", required=True, help="Address of the node that leaves.")
@click.option("--seconds", required=True, type=int, help="How long its tasks may take to end.")
def drain_(address: str, seconds: int) -> None:
    """A node takes no more work; wait until what runs on it has ended."""
    _answer(lambda: drain.drain(address, seconds))


if __name__ == "__main__":
    main()
