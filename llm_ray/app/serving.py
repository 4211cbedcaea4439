"""Serving: deploys, changes, stops and restores models; reads their status and logs.

`home` is the folder of models, data and runs, which also holds the serving state. `address` is the cluster that serves
(`auto` on one of its nodes, else HOST:PORT of the head's GCS); None means this machine's own Ray.

served = deploy(load_serve("quickstart", home=home), home, reporter)
stop(["quickstart"], home, reporter)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_
from functools import partial
from pathlib import Path

from llm_ray.app.api_service import open_service
from llm_ray.app.runs import show_run
from llm_ray.cluster import OBJECT_STORE_BYTES, clean_up
from llm_ray.conf.engines import EngineChoice, WeightForm
from llm_ray.conf.load import serve_options
from llm_ray.conf.section import Paths
from llm_ray.conf.serve import ModelServing, ServeConf, ServeRuntime
from llm_ray.errors import ConfError, LlmRayError, ModelError, RunError, ServeError
from llm_ray.models.load import fingerprint, resolve
from llm_ray.models.openvino import original
from llm_ray.progress import Reporter
from llm_ray.serve.deployments import deploy as serving
from llm_ray.serve.deployments import local
from llm_ray.serve.deployments.adapters import adapter_rank, check_adapter
from llm_ray.serve.deployments.deploy import Served
from llm_ray.serve.deployments.desired import desired_confs, desired_file, forget, remember
from llm_ray.serve.deployments.logs import read_logs
from llm_ray.serve.deployments.plan import Node, place, plan
from llm_ray.serve.deployments.plan import estimate as plan_of
from llm_ray.serve.models import Adapter, ServedModel

__all__ = [
    "Estimate",
    "ModelStatus",
    "Pair",
    "Served",
    "ServedModel",
    "Status",
    "conf_of",
    "deploy",
    "estimate",
    "local_log",
    "logs",
    "pair",
    "restart",
    "restore",
    "serve_run",
    "serves_here",
    "status",
    "stop",
    "stop_all",
    "undo",
]


# Passed in because the gateway must not import this layer, where the fine-tuning API's use cases live.
_serve = partial(serving.deploy, open_finetuning=open_service)


@dataclass(frozen=True)
class ModelStatus:
    """A deployed model. `state` is DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED or DELETING; `ready` means that
    requests are answered, possibly after a replica has started; `replicas` counts those answering, out of `wanted`;
    `message` comes from Ray Serve."""

    state: str
    ready: bool
    replicas: int
    wanted: int
    message: str
    reason: str
    """The relevant part of the message if the model is not ready, else empty."""
    counts: dict[str, float]
    """requests, errors, in_progress, prompt_tokens, generated_tokens, tokens_per_second; empty before the first
    count."""
    adapters: dict[str, dict[str, float]]
    """The same counts per adapter."""
    model: ServedModel


@dataclass(frozen=True)
class Status:
    """The deployed models by name. `url` is the base of the OpenAI API; None if nothing is served."""

    url: str | None
    models: dict[str, ModelStatus]
    needs_keys: bool = False
    """Whether requests need an API key."""


@dataclass(frozen=True)
class Estimate:
    """Resources that a model needs: `model` holds memory, cache and cores per replica. `problem` says why it does not
    fit; empty if it does."""

    model: ServedModel
    problem: str


@dataclass(frozen=True)
class Pair:
    """A run and its base model, under their served names. `conf` deploys those of the two that are not served yet; None
    if both are."""

    run: str
    base: str
    conf: ServeConf | None


def conf_of(
    models: Sequence[str],
    home: Path,
    *,
    names: Sequence[str] = (),
    address: str | None = None,
    host: str | None = None,
    port: int | None = None,
    tokenizer: str | None = None,
    engine: EngineChoice | None = None,
    weights: WeightForm | None = None,
    adapters: Mapping[str, str] | None = None,
    cpus: int | None = None,
    replicas: int | None = None,
    max_model_len: int | None = None,
    precision: str | None = None,
    overrides: Sequence[str] = (),
) -> ServeConf:
    """Returns the conf that serves `models` (runs, registry names, folders, hub ids) under their own names or `names`,
    all with the same settings; None leaves a setting at its default. `adapters` maps names to runs or folders;
    `overrides` are ``key=value`` as for ``--set`` and take precedence. Raises ConfError, ModelError."""
    paths = Paths.of(home)
    called = tuple(names) or tuple(resolve(model, paths).name for model in models)
    if len(called) != len(models):
        raise ConfError(f"--name is given {len(called)} times, --model {len(models)} times: name every model, or none")
    if len(set(called)) != len(called):
        raise ConfError(f"two models would have the same name ({', '.join(called)}): distinguish them with --name")
    if adapters and len(models) > 1:
        raise ConfError("--adapter works with a single --model: write a conf for several models with adapters")
    settings = {
        "tokenizer": tokenizer,
        "engine": engine,
        "weights": weights,
        "cpus": cpus,
        "replicas": replicas,
        "max_model_len": max_model_len,
        "precision": precision,
        "adapters": dict(adapters or {}),
    }
    given = {key: value for key, value in settings.items() if value is not None}
    return serve_options(
        {
            "runtime": {"mode": "cluster", "address": address} if address else {},
            "endpoint": {key: value for key, value in (("host", host), ("port", port)) if value is not None},
            "models": {name: given | {"model": model} for name, model in zip(called, models, strict=True)},
        },
        overrides,
        home,
        " ".join(f"--model {model}" for model in models),
    )


def pair(run: str, home: Path, running: Mapping[str, ModelStatus], address: str | None = None) -> Pair:
    """Returns the run and its base model for a comparison; `running` are the deployed models. If neither is served, the
    run is deployed as an adapter on its base if possible, so that only one model is in memory. Raises RunError for a
    run without a model, ModelError, ConfError."""
    paths = Paths.of(home)
    details = show_run(paths.runs, run)
    if details.output is None or not details.summary.base:
        raise RunError(f"the run {run} has no model yet: its stage export has not run")
    base = resolve(details.summary.base, paths)
    served = {*running, *(adapter for entry in running.values() for adapter in entry.model.adapters)}
    models = {name: model for name, model in ((base.name, details.summary.base), (run, run)) if name not in served}
    adapters = {}
    if len(models) == 2 and base.folder and _serves_as_adapter(run, details.output / "adapter", base.folder, paths):
        adapters[run] = models.pop(run)
    conf = conf_of([*models.values()], home, names=[*models], address=address, adapters=adapters) if models else None
    return Pair(run, base.name, conf)


def _serves_as_adapter(run: str, folder: Path, base: Path, paths: Paths) -> bool:
    try:
        return folder.is_dir() and adapter_rank(run, folder) > 0 and check_adapter(run, folder, base, paths) is None
    except ModelError:
        return False


def deploy(
    conf: ServeConf,
    home: Path,
    reporter: Reporter,
    *,
    only: Sequence[str] = (),
    timeout: float = 900,
    keep: bool = True,
) -> Served:
    """Deploys or updates the conf's models (or those in `only`) while others keep answering. Returns when all are
    ready.

    On this machine it starts a background Ray if none runs, and ends it again if the deployment fails. On a cluster,
    `restore` redeploys the models after a restart of the head, unless `keep` is False. Raises LlmRayError; previously
    served models are then restored.
    """
    models = plan(conf, reporter, only)
    starts = conf.runtime.mode == "local" and not serves_here(home)
    if starts:
        serving.check_port(conf.endpoint.host, conf.endpoint.port)
    try:
        with local.connected(conf.runtime, home, reporter, begin=True):
            served = _serve(models, conf.endpoint, home, reporter, timeout)
    except BaseException:
        if starts:
            _end(home)
        raise
    if conf.runtime.mode == "cluster" and keep:
        remember(
            desired_file(home),
            conf.model_copy(update={"endpoint": served.endpoint, "models": _settled(conf, served)}),
            [model.name for model in served.models],
        )
    return with_(served, started_ray=starts)


def _settled(conf: ServeConf, served: Served) -> dict[str, ModelServing]:
    """Returns the conf's models with the engine that `auto` selected, so that a restart selects the same."""
    engines = {model.name: model.engine for model in served.models}
    return {
        name: model.model_copy(update={"engine": engines[name]} if name in engines else {})
        for name, model in conf.models.items()
    }


def serve_run(run: str, name: str, home: Path, reporter: Reporter) -> str:
    """Serves the model of a run as `name` beside the models of this machine's endpoint; returns a description of how.

    It becomes an adapter on its base model if that is served and can take one, else a separate model. Raises
    LlmRayError if nothing is served or the model does not fit.
    """
    paths = Paths.of(home)
    details = show_run(paths.runs, run)
    if details.output is None or not details.summary.base:
        raise RunError(f"the run {run} has no model: its stage export is not done")
    base = resolve(details.summary.base, paths).folder
    with local.connected(ServeRuntime(), home, reporter):
        endpoint = serving.running_endpoint()
        if endpoint is None:
            raise ServeError("nothing is served on this machine")
        beside = [entry.model for entry in serving.status().values() if original(entry.model.path) == base]
        for model in beside:
            if _takes_adapter(model, run, details.output / "adapter", paths):
                adapter = Adapter(str(details.output / "adapter"), fingerprint(details.output / "adapter"))
                changed = with_(model, adapters=model.adapters | {name: adapter})
                _serve([changed], endpoint, home, reporter)
                return f"as an adapter on {model.name}"
        conf = conf_of([run], home, names=[name], max_model_len=beside[0].max_model_len if beside else None)
        _serve(plan(conf, reporter), endpoint, home, reporter)
        return "as a model of its own"


def _takes_adapter(model: ServedModel, run: str, folder: Path, paths: Paths) -> bool:
    """Returns whether the deployed model can load this adapter without restarting its replicas."""
    if not model.lora_rank or model.compile or not _serves_as_adapter(run, folder, model.path, paths):
        return False
    return adapter_rank(run, folder) <= model.lora_rank


def estimate(
    conf: ServeConf, rooms: Sequence[Node], running: Mapping[str, ModelStatus], reporter: Reporter
) -> list[Estimate]:
    """Estimates what each model of the conf needs, without loading or converting it, and whether it fits in `rooms`
    (empty: this machine now). Raises ModelError for a model that cannot be served."""
    hosts = list(rooms) or [this_machine()]
    found = []
    for name, asked in conf.models.items():
        model = plan_of(name, asked, conf.paths, reporter)
        holding = {
            called: with_(entry.model, replicas=max(entry.replicas, entry.wanted), autoscale=None)
            for called, entry in running.items()
        }
        try:
            (model,) = place([model], hosts, holding)
            found.append(Estimate(model, ""))
        except ServeError as error:
            found.append(Estimate(model, str(error)))
    return found


def this_machine() -> Node:
    """Returns the resources that a Ray started here would have."""
    import socket

    import psutil

    cpus, free = float(os.cpu_count() or 1), float(psutil.virtual_memory().available - OBJECT_STORE_BYTES)
    return Node(socket.gethostname(), cpus, free, cpus, free)


def restart(name: str, home: Path, reporter: Reporter, address: str | None = None, timeout: float = 900) -> Served:
    """Undeploys a model and deploys it again unchanged; it does not answer in between. Raises ServeError."""
    with local.connected(_runtime(address), home, reporter):
        entry, endpoint = serving.status().get(name), serving.running_endpoint()
        if entry is None or endpoint is None:
            raise ServeError(f"no model {name} is served here; served are: {', '.join(serving.status()) or 'none'}")
        serving.stop([name], reporter)
        return _serve([entry.model], endpoint, home, reporter, timeout)


def undo(served: Served, home: Path, reporter: Reporter, address: str | None = None) -> None:
    """Undeploys what `deploy` deployed and ends the Ray that it started. Requests in progress are completed first."""
    if served.started_ray:
        _end(home)
        return
    with local.connected(_runtime(address), home, reporter):
        serving.stop([model.name for model in served.models], reporter)


def stop(names: Sequence[str], home: Path, reporter: Reporter, address: str | None = None) -> None:
    """Undeploys models once their running requests are completed, and removes adapters from their base models, which
    keep answering. Raises ServeError for a name that is not deployed."""
    with local.connected(_runtime(address), home, reporter):
        served, endpoint = serving.status(), serving.running_endpoint()
        under = {adapter: name for name, entry in served.items() for adapter in entry.model.adapters}
        if models := [name for name in names if name in served or name not in under]:
            serving.stop(models, reporter)
        for base in dict.fromkeys(under[name] for name in names if name not in models):
            if endpoint is None or base in models:
                continue
            away, model = [name for name in names if under.get(name) == base], served[base].model
            reporter.line(f"Taking {', '.join(away)} away from {base}.")
            kept = {name: adapter for name, adapter in model.adapters.items() if name not in away}
            _serve([with_(model, adapters=kept)], endpoint, home, reporter)
    if address:
        forget(desired_file(home), names)


def stop_all(home: Path, reporter: Reporter, address: str | None = None) -> None:
    """Undeploys all models once their requests are completed; on this machine it also ends the serving Ray."""
    if not address:
        if not serves_here(home):
            clean_up()  # removes leftovers of a killed Ray
            reporter.line("Nothing is served on this machine.")
            return
        reporter.line("Stopping all models and their Ray.")
        _end(home)
        return
    with local.connected(_runtime(address), home, reporter):
        serving.stop_all(reporter)
    forget(desired_file(home))


def restore(home: Path, reporter: Reporter, timeout: float = 900) -> None:
    """Redeploys what a cluster served before its head restarted; models already served are left alone.

    `timeout` is the time for a model to become ready, in seconds. Raises ServeError naming the models that failed; the
    others are served.
    """
    confs = desired_confs(desired_file(home))
    if not confs:
        reporter.line("There is nothing to serve.")
        return
    failed = []
    with local.connected(confs[0].runtime, home, reporter):
        for conf in confs:
            (name,) = conf.models
            try:
                _serve(plan(conf, reporter), conf.endpoint, home, reporter, timeout)
                reporter.line(f"{name} is served.")
            except LlmRayError as error:  # continue with the other models
                failed.append(f"{name}: {error}")
    if failed:
        raise ServeError("\n  ".join([f"{len(failed)} of {len(confs)} models are not served:", *failed]))


def status(home: Path, reporter: Reporter, address: str | None = None) -> Status:
    """Returns the deployed models with the endpoint's counters."""
    if not address and not serves_here(home):
        return Status(None, {})
    with local.connected(_runtime(address), home, reporter):
        url, models, counts, endpoint = serving.url(), serving.status(), serving.stats(), serving.running_endpoint()
    return Status(
        url,
        {
            name: ModelStatus(
                state=entry.status,
                ready=entry.ready,
                replicas=entry.replicas,
                wanted=entry.wanted,
                message=entry.message,
                reason=serving.root_cause(entry.message) if entry.message and not entry.ready else "",
                counts=counts.get(name, {}),
                adapters={adapter: counts.get(adapter, {}) for adapter in entry.model.adapters},
                model=entry.model,
            )
            for name, entry in models.items()
        },
        needs_keys=endpoint is not None and endpoint.needs_keys,
    )


def logs(
    name: str, home: Path, reporter: Reporter, address: str | None = None, *, lines: int = 100, follow: bool = False
) -> Iterator[str]:
    """Yields the last `lines` log lines of each replica (of the HTTP endpoint for the name gateway); with `follow` also
    new lines, until the iterator is closed. Raises ServeError."""
    with local.connected(_runtime(address), home, reporter):
        yield from read_logs(name, lines, follow)


def serves_here(home: Path) -> bool:
    """Returns whether this machine's own Ray serves."""
    return local.running(home) is not None


def local_log(home: Path) -> Path:
    """Returns the path of the startup and shutdown log of this machine's own Ray."""
    return local.state_file(home).with_name("local.log")


def _end(home: Path) -> None:
    if found := local.running(home):
        local.end(found)


def _runtime(address: str | None) -> ServeRuntime:
    return ServeRuntime(mode="cluster", address=address) if address else ServeRuntime()
