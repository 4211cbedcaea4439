"""A command that fails in a way of choice."""

from __future__ import annotations

import click

from llm_ray.errors import ConfError, TrainError

FAILURES: dict[str, BaseException] = {
    "conf": ConfError("my.yaml:3: data.train is missing"),
    "train": TrainError("worker 1 was killed"),
    "interrupt": KeyboardInterrupt(),
    "usage": click.UsageError("not so"),
    "abort": click.Abort(),
    "defect": ZeroDivisionError("division by zero"),
}


@click.command()
@click.argument("failure")
def fail(failure: str) -> None:
    """Fails.

    \b
    Example:
      llm-ray fail conf
    """
    raise FAILURES[failure]
