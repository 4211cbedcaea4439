"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_CONFIG = click.option(
    "config", "--config", "--config_path", required=True, metavar="FILE|NAME", help="A conf file, or the name of a shipped template."
)
_SET = click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Give a variable of the template, or set a key of the conf (dotted, as training.epochs=2). Again for more.",
)
_VARS = click.option(
    "vars_files",
    "--vars",
    multiple=True,
    metavar="FILE",
    help="A YAML file with variables of the template. Again for more; later ones win.",
)


def config_options(command: F) -> F:
    """Adds ``--config``, ``--set`` and ``--vars``: the arguments ``config, overrides, vars_files`` of ``load_finetune``."""
    return _CONFIG(_SET(_VARS(command)))
