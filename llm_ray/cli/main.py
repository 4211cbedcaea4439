"""The command ``llm-ray``: dispatches to subcommands and turns errors into one message and an exit code.

Subcommands are imported on demand: ``llm-ray --help`` loads neither torch nor Ray. Exit codes: 0 success, 1 failure, 2
incorrect use (of a flag or in a conf), 130 interrupted. ``LLM_RAY_DEBUG=1`` shows tracebacks and warnings of libraries.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

import llm_ray
from llm_ray.errors import LlmRayError

# Maps each verb to its command and a one-line description.
COMMANDS = {
    "quickstart": (
        "llm_ray.cli.quickstart:quickstart",
        "Finetune a small model on bundled data, deploy it, and ask it questions.",
    ),
    "finetune": ("llm_ray.cli.finetune:finetune", "Finetune a model as described by a conf."),
    "sweep": (
        "llm_ray.cli.sweep:sweep",
        "Search for the best values of a finetune's keys, and export the best model.",
    ),
    "serve": ("llm_ray.cli.serve:serve", "Deploy models on Ray Serve, with an OpenAI-compatible API."),
    "infer": ("llm_ray.cli.infer:infer", "Ask a deployed model."),
    "model": ("llm_ray.cli.model:model", "List, import, convert, export and remove models."),
    "data": ("llm_ray.cli.data:data", "Show data as the model will see it; make data from documents."),
    "status": ("llm_ray.cli.status:status", "Show the cluster, its jobs, and what is served."),
    "runs": ("llm_ray.cli.runs:runs", "List, show, compare, stop and delete runs."),
    "jobs": ("llm_ray.cli.jobs:jobs", "Finetune in the background, one after the other."),
    "ui": ("llm_ray.cli.ui:ui", "Serve the web page to finetune, deploy and ask models."),
    "doctor": ("llm_ray.cli.doctor:doctor", "Check this host and its environment, with a fix for each finding."),
    "bench": ("llm_ray.cli.bench:bench", "Measure an endpoint under load."),
}


class LlmRay(click.Group):
    """The group of all verbs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.exceptions.NoSuchCommand(args[0], possibilities=list(COMMANDS), ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LlmRayError as error:
            _fail(ctx, f"Error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "\nInterrupted.", 130)
        except click.ClickException as error:
            if ctx.params["errors"] == "text":
                raise  # click also shows the usage
            _fail(ctx, f"Error: {error.format_message()}", error.exit_code)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # handled by click
        except (OSError, MemoryError) as error:  # not a bug: a full disk, a read-only folder, out of memory
            _fail(ctx, f"Error: {_of_the_machine(error)}. The traceback is in {_report()}", 1)
        except Exception as error:
            message = f"Error: {type(error).__name__}: {error}\nThis is a bug in llm-ray or in one of its libraries."
            _fail(ctx, f"{message} The traceback is in {_report()}; LLM_RAY_DEBUG=1 shows it here.", 1)


def _debugging() -> bool:
    return os.environ.get("LLM_RAY_DEBUG", "0") not in ("", "0")


def _quiet_libraries() -> None:
    """Silences warnings of libraries (peft, torch, transformers), which address Python callers; users get our own
    messages. LLM_RAY_DEBUG, PYTHONWARNINGS or TRANSFORMERS_VERBOSITY restores them."""
    if _debugging():
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        sys.warnoptions.append("ignore")  # for processes started by multiprocessing
        warnings.simplefilter("ignore")


def _fail(ctx: click.Context, message: str, code: int) -> NoReturn:
    if _debugging():
        traceback.print_exc()
    if ctx.params["errors"] == "json":
        click.echo(json.dumps({"error": message.strip().removeprefix("Error: ")}))
    else:
        click.echo(message, err=True)
    ctx.exit(code)


def _of_the_machine(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{', '.join(names)}: {error.strerror}" if names and error.strerror else str(error) or type(error).__name__


def _report() -> Path:
    """Writes the current exception's traceback to a file and returns its path."""
    from llm_ray.conf.section import home

    text = f"llm-ray {llm_ray.__version__}, Python {platform.python_version()}, {platform.platform()}\n\n{traceback.format_exc()}"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (home() / "logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return folder / name
    return Path(os.devnull)


@click.group(cls=LlmRay, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(llm_ray.__version__, prog_name="llm-ray")
@click.option(
    "--errors",
    type=click.Choice(["text", "json"]),
    default="text",
    help='How an error is reported: text on standard error, or {"error": …} as the last line of standard output. '
    "Default: text.",
)
def cli(errors: str) -> None:
    """Finetune and serve large language models on Ray, on Xeon clusters without GPUs.

    \b
    Examples:
      llm-ray quickstart
      llm-ray finetune --config lora --set train=tickets.jsonl
      llm-ray runs list
    """


def main() -> None:
    """Entry point of the command. SIGTERM (from a service manager, a batch system, Ansible) has the same effect as
    Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _quiet_libraries()
    cli(prog_name="llm-ray")
