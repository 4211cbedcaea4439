"""``llm-ray serve``: models behind the OpenAI API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_ray.cli.keys import keys
from llm_ray.cli.options import serve_config_options

if TYPE_CHECKING:
    from llm_ray.conf.serve import ServeConf, ServeRuntime


class _DeployByDefault(click.Group):
    """``serve --model M`` means ``serve deploy --model M``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["deploy", *args]
        return super().parse_args(ctx, args)


_ADDRESS = click.option(
    "--address",
    metavar="auto|HOST:PORT",
    envvar="RAY_ADDRESS",  # set on the nodes of a cluster that site.yml made
    show_envvar=True,
    help="The cluster that serves: auto on one of its nodes, else its head's GCS. Default: this machine.",
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
@click.option("--only", multiple=True, metavar="NAME", help="Deploy this model of the conf, not all. Again for more.")
@click.option(
    "bases",
    "--model",
    multiple=True,
    metavar="RUN|NAME|FOLDER|HUB-ID",
    help="Without --config: a run, a name in the model registry, a folder, or a hub id. Again for more.",
)
@click.option(
    "names", "--name", multiple=True, help="What clients call the model; one for each --model. Default: the run's or the folder's name."
)
@click.option("--tokenizer", metavar="FOLDER|NAME", help="Tokenizer other than the model's own.")
@click.option("--engine", type=click.Choice(["vllm", "openvino", "transformers"]), help="What computes. Default: vllm.")
@click.option(
    "--weights", type=click.Choice(["fp32", "bf16", "int8", "int4"]), help="Form of the weights for engine openvino. Default: int8."
)
@click.option(
    "adapters", "--adapter", multiple=True, metavar="NAME=RUN|FOLDER", help="A LoRA adapter on the model, under a name of its own."
)
@click.option("--cpus", type=click.IntRange(1), help="Cores for each model. Default: as many free ones as help it.")
@click.option("--replicas", type=click.IntRange(1), help="Replicas of each model. Default: 1.")
@click.option(
    "--max-model-len", type=click.IntRange(16), help="Longest prompt and answer together, in tokens. Default: the model's, at most 8192."
)
@click.option("--host", metavar="ADDRESS", help="Address to listen at. Beyond loopback API keys are demanded. Default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen at. Default: 8000.")
@click.option("--foreground", is_flag=True, help="Stay, and take the models away at Ctrl-C or SIGTERM.")
@click.option("--timeout", type=click.FloatRange(1), default=900, show_default=True, help="Seconds within which the models must be ready.")
@_ADDRESS
def deploy(**given: Any) -> None:
    """Deploy models, or change deployed ones; the others go on answering.

    On this machine Ray is started in the background, unless it runs; `llm-ray serve stop --all` ends it.

    \b
    Examples:
      llm-ray serve deploy --model quickstart
      llm-ray serve deploy --model smollm2-135m-instruct --engine openvino
      llm-ray serve deploy --config models --only qwen3-0.6b
      llm-ray serve --model ./my-model --tokenizer ./my-tokenizer --name support-bot
    """
    from llm_ray.console import Reporter
    from llm_ray.serve import declared, local
    from llm_ray.serve.deploy import check_port
    from llm_ray.serve.deploy import deploy as deploy_models
    from llm_ray.serve.plan import plan

    conf = _conf(given)
    reporter = Reporter()
    models = plan(conf, reporter, given["only"])
    mine = conf.runtime.mode == "local" and local.running() is None
    if mine:
        check_port(conf.endpoint.host, conf.endpoint.port)
    try:
        with local.connected(conf.runtime, reporter, begin=True):
            served = deploy_models(models, conf.endpoint, reporter, given["timeout"])
    except BaseException:
        if mine and (started := local.running()):
            local.end(started)
        raise
    if conf.runtime.mode == "cluster" and not given["foreground"]:
        declared.remember(conf.model_copy(update={"endpoint": served.endpoint}), [model.name for model in served.models])
    _tell(served, reporter)
    if given["foreground"]:
        _stay([model.name for model in models], conf.runtime, mine, reporter)


# Options that describe the model of --model.
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
    """The conf that the options mean. Raises ConfError."""
    from llm_ray.conf.load import load_serve
    from llm_ray.errors import ConfError

    if given["config"] and (beside := [flag for name, flag in _FOR_MODEL.items() if given[name]]):
        raise ConfError(f"--config and {beside[0]}: the conf says it; --set models.NAME.KEY=… changes what it says")
    if given["config"]:
        settings = [
            f"{key}={given[name]}"
            for key, name in (("endpoint.host", "host"), ("endpoint.port", "port"), ("runtime.address", "address"))
            if given[name] is not None
        ]
        if given["address"]:
            settings.append("runtime.mode=cluster")
        return load_serve(given["config"], [*settings, *given["overrides"]], given["vars_files"])
    if not given["bases"]:
        raise ConfError("nothing to deploy: name a model (--model RUN|NAME|FOLDER|HUB-ID) or a conf (--config FILE|NAME)")
    return _made(given)


def _made(given: dict[str, Any]) -> ServeConf:
    from pydantic import ValidationError

    from llm_ray.conf.schema import Paths
    from llm_ray.conf.serve import ServeConf
    from llm_ray.errors import ConfError
    from llm_ray.models.load import resolve

    bases = given["bases"]
    names = given["names"] or tuple(resolve(base, Paths()).name for base in bases)
    if len(names) != len(bases):
        raise ConfError(f"--name is given {len(names)} times, --model {len(bases)} times: give each model a name, or none")
    if len(set(names)) != len(names):
        raise ConfError(f"two models would be called the same ({', '.join(names)}): tell them apart with --name")
    adapters = dict(_pair(text) for text in given["adapters"])
    if adapters and len(bases) > 1:
        raise ConfError("--adapter goes with one --model: write a conf for several models with adapters")
    common = {
        key: given[key] for key in ("tokenizer", "engine", "weights", "cpus", "replicas", "max_model_len") if given[key] is not None
    } | {"adapters": adapters}
    endpoint = {key: given[key] for key in ("host", "port") if given[key] is not None}
    runtime = {"mode": "cluster", "address": given["address"]} if given["address"] else {}
    try:
        return ServeConf.model_validate(
            {
                "runtime": runtime,
                "endpoint": endpoint,
                "models": {name: common | {"model": base} for name, base in zip(names, bases, strict=True)},
            }
        )
    except ValidationError as error:
        raise ConfError(
            "\n  ".join(str(e["ctx"]["error"]) if "ctx" in e and "error" in e["ctx"] else e["msg"] for e in error.errors())
        ) from error


def _pair(text: str) -> tuple[str, str]:
    from llm_ray.errors import ConfError

    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise ConfError(f"--adapter {text}: write it as NAME=RUN or NAME=FOLDER")
    if place.startswith(("./", "../", "~")):
        place = str(Path(place).expanduser().absolute())
    return name, place


def _tell(served: Any, reporter: Any) -> None:
    import json

    first = served.models[0]
    reporter.line(f"Ready after {served.seconds:.0f} s at {served.url} (OpenAI API)", style="bold")
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


def _stay(names: list[str], runtime: ServeRuntime, mine: bool, reporter: Any) -> None:
    """Until Ctrl-C or SIGTERM; then the models are taken away, with the Ray that this command started. Raises ServeError where the Ray
    of this machine ends before, so that whoever watches this command starts it anew."""
    from llm_ray.errors import ServeError
    from llm_ray.serve import local
    from llm_ray.serve.deploy import stop as stop_models
    from llm_ray.serve.foreground import until_interrupted

    if not until_interrupted(reporter, lambda: runtime.mode == "cluster" or local.running() is not None):
        log = local.state_file().with_name("local.log")
        raise ServeError(f"nothing is served any more: another command has stopped it, or Ray ended by itself ({log})")
    if mine and (started := local.running()):
        local.end(started)
        return
    with local.connected(runtime, reporter):
        stop_models(names, reporter)


def _runtime(address: str | None) -> ServeRuntime:
    from llm_ray.conf.serve import ServeRuntime

    return ServeRuntime(mode="cluster", address=address) if address else ServeRuntime()


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
    import json
    from dataclasses import asdict

    from llm_ray.console import Reporter
    from llm_ray.serve import deploy as serving
    from llm_ray.serve import local

    if not address and local.running() is None:
        click.echo(json.dumps({"url": None, "models": {}}) if as_json else "Nothing is served on this machine.")
        return
    runtime = _runtime(address)
    with local.connected(runtime, Reporter()):
        url, models, counts = serving.url(), serving.status(), serving.stats()
    if as_json:
        told = {
            name: {
                "state": entry.status,
                "ready": entry.ready,
                "replicas": entry.replicas,
                "wanted": entry.wanted,
                "message": entry.message,
                **counts.get(name, {}),
                "adapters": {adapter: counts.get(adapter, {}) for adapter in entry.model.adapters},
                "model": asdict(entry.model),
            }
            for name, entry in models.items()
        }
        click.echo(json.dumps({"url": url, "models": told}, default=str, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Models at {url}", title_justify="left", box=box.SIMPLE)
    for column in ("model", "engine", "state", "replicas", "requests", "failed", "running", "tokens in", "out", "out/s"):
        table.add_column(column, justify="left" if column in ("model", "engine", "state") else "right", overflow="fold")
    numbers = ("requests", "errors", "in_progress", "prompt_tokens", "generated_tokens", "tokens_per_second")

    def counted(name: str) -> list[str]:
        return [f"{counts.get(name, {}).get(key, 0):,}" for key in numbers]

    for name, entry in sorted(models.items()):
        state = entry.status.lower().replace("_", " ")
        table.add_row(name, entry.model.engine, state, f"{entry.replicas}/{entry.wanted}", *counted(name))
        for adapter in entry.model.adapters:
            table.add_row(f"  {adapter}", "adapter", "", "", *counted(adapter))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table if models else f"No models are deployed at {url}.")
    for name, entry in models.items():
        if entry.message and not entry.ready:
            click.echo(f"{name}: {serving.tell_reason(entry.message)}")


@serve.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("everything", "--all", is_flag=True, help="All models; on this machine also the Ray that serves.")
@_ADDRESS
def stop(names: tuple[str, ...], everything: bool, address: str | None) -> None:
    """Take models away, when the requests they work on are answered.

    \b
    Examples:
      llm-ray serve stop quickstart
      llm-ray serve stop --all
    """
    from llm_ray.cluster import clean_up
    from llm_ray.console import Reporter
    from llm_ray.errors import ConfError
    from llm_ray.serve import declared, local
    from llm_ray.serve import deploy as serving

    if bool(names) == everything:
        raise ConfError("name the models to stop, or give --all: llm-ray serve stop NAME")
    reporter = Reporter()
    if everything and not address:
        found = local.running()
        if found is None:
            clean_up()  # where it was killed
            reporter.line("Nothing is served on this machine.")
            return
        reporter.line("Stopping all models, and the Ray that serves them.")
        local.end(found)
        return
    runtime = _runtime(address)
    with local.connected(runtime, reporter):
        if everything:
            serving.stop_all(reporter)
        else:
            serving.stop(names, reporter)
    if address:
        declared.forget(None if everything else names)


@serve.command()
@click.option("--timeout", type=click.FloatRange(1), default=900, show_default=True, help="Seconds within which a model must be ready.")
def restore(timeout: float) -> None:
    """On a cluster's head: serve again what was served before it started anew.

    The unit llm-ray-serve does this after each start of Ray's head. Models that are served already are left alone.

    \b
    Example:
      llm-ray serve restore
    """
    from llm_ray.console import Reporter
    from llm_ray.errors import LlmRayError, ServeError
    from llm_ray.serve import declared, local
    from llm_ray.serve.deploy import deploy as deploy_models
    from llm_ray.serve.plan import plan

    reporter = Reporter()
    confs = declared.declared()
    if not confs:
        reporter.line("Nothing is to be served.")
        return
    failed = []
    with local.connected(confs[0].runtime, reporter):
        for conf in confs:
            (name,) = conf.models
            try:
                deploy_models(plan(conf, reporter), conf.endpoint, reporter, timeout)
                reporter.line(f"{name} is served.")
            except LlmRayError as error:  # the others are served all the same
                failed.append(f"{name}: {error}")
    if failed:
        raise ServeError("\n  ".join([f"{len(failed)} of {len(confs)} models are not served:", *failed]))


@serve.command()
@click.argument("name")
@click.option("-n", "lines", type=click.IntRange(1), default=100, show_default=True, help="Lines from the end of each replica's log.")
@click.option("-f", "follow", is_flag=True, help="Go on with what is logged from now on, until Ctrl-C.")
@_ADDRESS
def logs(name: str, lines: int, follow: bool, address: str | None) -> None:
    """Show what a model's replicas have logged, those that failed included. NAME `gateway` is the HTTP endpoint.

    \b
    Examples:
      llm-ray serve logs quickstart
      llm-ray serve logs gateway -f
    """
    from llm_ray.console import Reporter
    from llm_ray.serve import local
    from llm_ray.serve.logs import read_logs

    runtime = _runtime(address)
    with local.connected(runtime, Reporter()):
        for line in read_logs(name, lines, follow):
            click.echo(line)
