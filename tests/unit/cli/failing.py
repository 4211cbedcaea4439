"""A command that fails in a way of choice."""

from __future__ import annotations

import multiprocessing
import warnings

import click

from llm_ray.errors import ConfError, TrainError

FAILURES: dict[str, BaseException] = {
    "conf": ConfError("my.yaml:3: data.train is missing"),
    "train": TrainError("worker 1 was killed"),
    "quoting": TrainError("the log ends:\nValueError: no such row"),
    "interrupt": KeyboardInterrupt(),
    "usage": click.UsageError("not so"),
    "abort": click.Abort(),
    "disk": OSError(28, "No space left on device", "/data/rows"),
    "memory": MemoryError(),
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
    if failure == "warnings":
        from transformers.utils import logging

        logging.get_logger("transformers.any").warning("raw words of transformers")
        _warn()
        (child := multiprocessing.get_context("spawn").Process(target=_warn)).start()
        child.join()
        failure = "train"
    raise FAILURES[failure]


def _warn() -> None:
    warnings.warn("raw words of Python", UserWarning, stacklevel=1)
