"""Options shared by several commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from llm_ray.errors import ConfError

F = TypeVar("F", bound=Callable[..., Any])


def set_option(help: str) -> Callable[[F], F]:
    """Adds ``--set`` as the argument `overrides`, the ``KEY=VALUE`` that were given."""
    return click.option("overrides", "--set", multiple=True, metavar="KEY=VALUE", help=help)


def _config_options(example: str, required: bool) -> Callable[[F], F]:
    config = click.option(
        "config",
        "--config",
        "--config_path",
        required=required,
        metavar="FILE|NAME",
        help="A conf file, or the name of a shipped template.",
    )
    settings = set_option(
        f"Set a variable of the template, or a key of the conf (dotted, as {example}). Repeat for more."
    )
    files = click.option(
        "vars_files",
        "--vars",
        multiple=True,
        metavar="FILE",
        help="A YAML file with variables of the template. Repeat for more; later ones take precedence.",
    )
    return lambda command: config(settings(files(command)))


def config_options(command: F) -> F:
    """Adds ``--config``, ``--set`` and ``--vars`` as the arguments ``config, overrides, vars_files`` of
    ``load_finetune``."""
    return _config_options("training.epochs=2", required=True)(command)


def serve_config_options(command: F) -> F:
    """Same for ``load_serve``; `config` may be ``None``."""
    return _config_options("models.my-bot.cpus=4", required=False)(command)


def address_option(help: str) -> Callable[[F], F]:
    """Adds ``--address`` as the argument `address`, None if not given. `help` says what it is for, and its default."""
    return click.option(
        "--address",
        metavar="auto|HOST:PORT",
        envvar="RAY_ADDRESS",  # set on cluster nodes by site.yml
        show_envvar=True,
        help=help,
    )


_ENDPOINT = click.option(
    "url",
    "--model_endpoint",
    "--model-endpoint",
    "--endpoint",
    required=True,
    metavar="URL",
    help="An OpenAI API (http://HOST:PORT/v1), or one model's own route (http://HOST:PORT/MODEL).",
)
_LOCAL_ENDPOINT = click.option(
    "url",
    "--model_endpoint",
    "--model-endpoint",
    "--endpoint",
    default="http://127.0.0.1:8000/v1",
    show_default=True,
    metavar="URL",
    help="An OpenAI API that supports JSON schemas, as llm-ray serve does.",
)
_MODEL = click.option("--model", metavar="NAME", help="The model, for an OpenAI API. Default: its only model.")
_KEY_FILE = click.option(
    "--api-key-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Read the API key from FILE. Default: from LLM_RAY_API_KEY, else OPENAI_API_KEY, in the environment.",
)
_KEY = click.option(
    "--api-key",
    metavar="KEY",
    help="The API key itself: not recommended, since other users of this machine can see it.",
)
_TIMEOUT = click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds for a whole answer, including waits for a busy endpoint.",
)


def endpoint_options(command: F) -> F:
    """Adds a client's options: the arguments ``url, model, api_key, api_key_file, timeout``."""
    return _ENDPOINT(_MODEL(_KEY_FILE(_KEY(_TIMEOUT(command)))))


def local_endpoint_options(command: F) -> F:
    """Adds the options of an OpenAI API client, whose default is this machine's endpoint: the arguments ``url, model,
    api_key_file, timeout``, without a key on the command line."""
    return _LOCAL_ENDPOINT(_MODEL(_KEY_FILE(_TIMEOUT(command))))


def from_stdin(form: str, what: str) -> dict[str, Any]:
    """Returns the JSON object on standard input, a mapping of `what` in the `form` given. Raises ConfError."""
    try:
        given = json.load(sys.stdin)
    except ValueError as error:
        raise ConfError(f"standard input is not JSON: expected {form}") from error
    if not isinstance(given, dict):
        raise ConfError(f"standard input has no {what}: expected {form}")
    return given
