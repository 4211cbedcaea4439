"""``llm-ray serve``: models behind the OpenAI API."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from llm_ray.cli.foreground import until_interrupted
from llm_ray.cli.keys import keys
from llm_ray.cli.options import address_option, serve_config_options
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.engines import WEIGHTS, EngineChoice
from llm_ray.conf.section import home
from llm_ray.errors import ConfError, ServeError
from llm_ray.progress import Reporter

if TYPE_CHECKING:
    from llm_ray.app.serving import Served
    from llm_ray.conf.serve import ServeConf


class _DeployByDefault(click.Group):
    """``serve --model M`` means ``serve deploy --model M``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["deploy", *args]
        return super().parse_args(ctx, args)


_ADDRESS = address_option(
    "The cluster that serves: auto on one of its nodes, else its head's GCS. Default: this machine."
)


@click.group(cls=_DeployByDefault)
def serve() -> None:
    """Deploy models on Ray Serve, with an OpenAI-compatible API.

    \b
    Examples:
      llm-ray serve deploy --model quickstart
      llm-ray serve status
      llm-ray serve stop quickstart
    """


serve.add_command(keys)


@serve.command()
@serve_config_options
@click.option("--only", multiple=True, metavar="NAME", help="Deploy only this model of the conf. Repeat for more.")
@click.option(
    "bases",
    "--model",
    multiple=True,
    metavar="RUN|NAME|FOLDER|HUB-ID",
    help="Without --config: a run, a name in the model registry, a folder, or a hub id. Repeat for more.",
)
@click.option(
    "names",
    "--name",
    multiple=True,
    help="The model's name for clients; one for each --model. Default: the name of the run or folder.",
)
@click.option("--tokenizer", metavar="FOLDER|NAME", help="Tokenizer other than the model's own.")
@click.option(
    "--engine",
    type=click.Choice(get_args(EngineChoice)),
    help="Inference engine. Default: auto, the fastest one that supports the other options.",
)
@click.option("--weights", type=click.Choice(WEIGHTS), help="Form of the weights for engine openvino. Default: int8.")
@click.option(
    "adapters",
    "--adapter",
    multiple=True,
    metavar="NAME=RUN|FOLDER",
    help="A LoRA adapter on the model, under its own name.",
)
@click.option("--cpus", type=click.IntRange(1), help="Cores for each model. Default: as many free ones as are useful.")
@click.option("--replicas", type=click.IntRange(1), help="Replicas of each model. Default: 1.")
@click.option(
    "--max-model-len",
    type=click.IntRange(16),
    help="Maximum length of prompt and answer together, in tokens. Default: the model's, at most 8192.",
)
@click.option(
    "--host",
    metavar="ADDRESS",
    help="Address to listen on. Beyond loopback, API keys are required. Default: 127.0.0.1.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on. Default: 8000.")
@click.option("--foreground", is_flag=True, help="Keep running, and remove the models on Ctrl-C or SIGTERM.")
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=900,
    show_default=True,
    help="Seconds within which the models must be ready.",
)
@_ADDRESS
def deploy(**given: Any) -> None:
    """Deploy models, or change deployed ones, without interrupting the others.

    On this machine, Ray starts in the background if it is not running; `llm-ray serve stop --all` stops it.

    \b
    Examples:
      llm-ray serve deploy --model quickstart
      llm-ray serve deploy --model smollm2-135m-instruct --engine openvino
      llm-ray serve deploy --config models --only qwen3-0.6b
      llm-ray serve --model ./my-model --tokenizer ./my-tokenizer --name support-bot
    """
    from llm_ray.app.serving import deploy as deploy_models

    conf, reporter = _conf(given), Terminal()
    served = deploy_models(
        conf, home(), reporter, only=given["only"], timeout=given["timeout"], keep=not given["foreground"]
    )
    _tell(served, reporter)
    if given["foreground"]:
        _stay(served, conf.runtime.address if conf.runtime.mode == "cluster" else None, reporter)


# Options for the model of --model.
_FOR_MODEL = {
    "bases": "--model",
    "names": "--name",
    "tokenizer": "--tokenizer",
    "engine": "--engine",
    "weights": "--weights",
    "adapters": "--adapter",
    "cpus": "--cpus",
    "replicas": "--replicas",
    "max_model_len": "--max-model-len",
}


def _conf(given: dict[str, Any]) -> ServeConf:
    """Returns the conf for the options. Raises ConfError."""
    from llm_ray.app.serving import conf_of
    from llm_ray.conf.load import load_serve

    if given["config"] and (beside := [flag for name, flag in _FOR_MODEL.items() if given[name]]):
        raise ConfError(f"--config and {beside[0]}: the conf sets it; override it with --set models.NAME.KEY=…")
    if given["config"]:
        settings = [
            f"{key}={given[name]}"
            for key, name in (("endpoint.host", "host"), ("endpoint.port", "port"), ("runtime.address", "address"))
            if given[name] is not None
        ]
        if given["address"]:
            settings.append("runtime.mode=cluster")
        return load_serve(given["config"], [*settings, *given["overrides"]], given["vars_files"], home())
    if not given["bases"]:
        raise ConfError(
            "nothing to deploy: name a model (--model RUN|NAME|FOLDER|HUB-ID) or a conf (--config FILE|NAME)"
        )
    if given["vars_files"]:
        raise ConfError(
            f"--vars {given['vars_files'][0]}: it sets variables of a template: name the template with --config"
        )
    same = (
        "names",
        "address",
        "host",
        "port",
        "tokenizer",
        "engine",
        "weights",
        "cpus",
        "replicas",
        "max_model_len",
        "overrides",
    )
    adapters = dict(_pair(text) for text in given["adapters"])
    return conf_of(given["bases"], home(), adapters=adapters, **{name: given[name] for name in same})


def _pair(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise ConfError(f"--adapter {text}: write it as NAME=RUN or NAME=FOLDER")
    if place.startswith(("./", "../", "~")):
        place = str(Path(place).expanduser().absolute())
    return name, place


def _tell(served: Served, reporter: Reporter) -> None:
    first = served.models[0]
    reporter.line(f"Ready after {served.seconds:.0f} s at {served.url} (OpenAI API)", kind="heading")
    for model in served.models:
        for name in (model.name, *model.adapters):
            reporter.line(f"  {name}: {served.route(name)}")
    key = " -H 'Authorization: Bearer KEY'" if served.endpoint.needs_keys else ""
    if key:
        reporter.line("Requests need an API key: llm-ray serve keys add NAME")
    examples: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        "completions": ("completions", {"prompt": "Hello"}),
        "embeddings": ("embeddings", {"input": "Hello"}),
    }
    path, asked = examples[first.task]
    body = json.dumps({"model": first.name} | asked)
    reporter.line(f"Try: curl {served.url}/{path}{key} -H 'Content-Type: application/json' -d '{body}'")


def _stay(served: Served, address: str | None, reporter: Reporter) -> None:
    """Waits for Ctrl-C or SIGTERM, then removes the deployed models. Raises ServeError if this machine's Ray ends
    before, so that a supervisor restarts this command."""
    from llm_ray.app.serving import local_log, serves_here, undo

    if not until_interrupted(reporter, lambda: address is not None or serves_here(home())):
        log = local_log(home())
        raise ServeError(f"nothing is served any more: another command stopped it, or Ray ended by itself ({log})")
    undo(served, home(), reporter, address)


@serve.command()
@click.option("as_json", "--json", is_flag=True, help="Print JSON.")
@_ADDRESS
def status(as_json: bool, address: str | None) -> None:
    """Show the deployed models: state, replicas, requests, tokens.

    \b
    Examples:
      llm-ray serve status
      llm-ray serve status --json
    """
    from llm_ray.app.serving import status as status_of

    found = status_of(home(), Terminal(), address)
    if as_json:
        document = {
            name: {
                "state": entry.state,
                "ready": entry.ready,
                "replicas": entry.replicas,
                "wanted": entry.wanted,
                "message": entry.message,
                **entry.counts,
                "adapters": entry.adapters,
                "model": asdict(entry.model),
            }
            for name, entry in found.models.items()
        }
        click.echo(json.dumps({"url": found.url, "models": document}, default=str, indent=2))
        return
    if found.url is None and not address:
        click.echo("Nothing is served on this machine.")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Models at {found.url}", title_justify="left", box=box.SIMPLE)
    for column in (
        "model",
        "engine",
        "state",
        "replicas",
        "requests",
        "failed",
        "running",
        "tokens in",
        "out",
        "out/s",
    ):
        table.add_column(column, justify="left" if column in ("model", "engine", "state") else "right", overflow="fold")
    numbers = ("requests", "errors", "in_progress", "prompt_tokens", "generated_tokens", "tokens_per_second")

    def counted(counts: dict[str, float]) -> list[str]:
        return [f"{counts.get(key, 0):,}" for key in numbers]

    for name, entry in sorted(found.models.items()):
        state = entry.state.lower().replace("_", " ")
        table.add_row(name, entry.model.engine, state, f"{entry.replicas}/{entry.wanted}", *counted(entry.counts))
        for adapter, counts in entry.adapters.items():
            table.add_row(f"  {adapter}", "adapter", "", "", *counted(counts))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table if found.models else f"No models are deployed at {found.url}.")
    for name, entry in sorted(found.models.items()):
        if sampling := entry.model.sampling:
            values = ", ".join(f"{setting} {value:g}" for setting, value in sampling.items())
            click.echo(f"{name}: default sampling settings {values} (from its generation_config.json)")
        if entry.reason:
            click.echo(f"{name}: {entry.reason}")


@serve.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("everything", "--all", is_flag=True, help="All models; on this machine also the Ray that serves them.")
@_ADDRESS
def stop(names: tuple[str, ...], everything: bool, address: str | None) -> None:
    """Remove models, or adapters from their models, once their requests in progress have finished.

    \b
    Examples:
      llm-ray serve stop quickstart
      llm-ray serve stop --all
    """
    from llm_ray.app.serving import stop as stop_models
    from llm_ray.app.serving import stop_all
    from llm_ray.cli.terminal import Terminal

    if bool(names) == everything:
        raise ConfError("name the models to stop, or use --all: llm-ray serve stop NAME")
    if everything:
        stop_all(home(), Terminal(), address)
    else:
        stop_models(names, home(), Terminal(), address)


@serve.command()
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=900,
    show_default=True,
    help="Seconds within which a model must be ready.",
)
def restore(timeout: float) -> None:
    """On a cluster's head: restore the models that were served before it restarted.

    The unit llm-ray-serve runs this after each start of Ray's head. Models that are already served are unchanged.

    \b
    Example:
      llm-ray serve restore
    """
    from llm_ray.app.serving import restore as restore_models

    restore_models(home(), Terminal(), timeout)


@serve.command()
@click.argument("name")
@click.option(
    "-n",
    "lines",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Number of last lines of each replica's log.",
)
@click.option("-f", "follow", is_flag=True, help="Follow the log until Ctrl-C.")
@_ADDRESS
def logs(name: str, lines: int, follow: bool, address: str | None) -> None:
    """Show the logs of a model's replicas, including failed ones. NAME `gateway` is the HTTP endpoint.

    \b
    Examples:
      llm-ray serve logs quickstart
      llm-ray serve logs gateway -f
    """
    from llm_ray.app.serving import logs as logs_of

    for line in logs_of(name, home(), Terminal(), address, lines=lines, follow=follow):
        click.echo(line)
