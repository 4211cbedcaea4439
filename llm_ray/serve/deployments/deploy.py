"""Deploys, changes and removes models on the connected Ray, each independently of the others.

with local.connected(conf.runtime, home, reporter, begin=True):
    endpoint = deploy(models, conf.endpoint, home, reporter)
    ...  # endpoint.url is http://127.0.0.1:8000/v1
    stop("smollm2", reporter)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llm_ray
from llm_ray.conf.serve import Endpoint
from llm_ray.errors import ServeError
from llm_ray.progress import Reporter
from llm_ray.serve import directory
from llm_ray.serve.deployments.plan import Node, beyond_room, describe, fits_beside, place
from llm_ray.serve.directory import DEPLOYMENT, GATEWAY, Deployed
from llm_ray.serve.gateway.deployment import Gateway
from llm_ray.serve.gateway.finetuning.service import Opening
from llm_ray.serve.gateway.protect import Protection
from llm_ray.serve.models import ServedModel
from llm_ray.serve.replica.deployment import ModelReplica, start_environment
from llm_ray.threads import Once

_POLL = 0.1  # seconds
_START_POLL = 0.5  # seconds; Serve's status takes tens of milliseconds of the cores that the models start on
_SETTLES = 5.0  # seconds until Ray reports an ended replica's resources as free
_ERROR_LINE = re.compile(r"((?:[a-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception)): (.+)")
# Errors that only refer to another one.
_EMPTY = ("Engine core initialization failed", "Failed to start", "Traceback", "The actor died", "ray::")
# vLLM's advice for a cache that is too small names settings that do not exist here.
_ADVICE = re.compile(r"Try (?:increasing|decreasing) .*gpu_memory_utilization.*")
_GRACE = 60.0  # seconds for Serve's own work
_AT_ONCE = 15.0  # seconds, after Ctrl-C
# A replica that dies during its start (kill -9, out of memory) is started again; `deploy` itself fails at the first
# error reported.
_STARTS = 5
_FAILED_TO_START = "failed to start"
_LOGGING: Once[None] = Once()


@dataclass(frozen=True)
class Served:
    """The served models: `url` is the base of the OpenAI API, such as http://127.0.0.1:8000/v1."""

    url: str
    seconds: float
    """Time until all models were ready."""
    models: tuple[ServedModel, ...]
    endpoint: Endpoint
    """With unset options filled in from the running endpoint."""
    started_ray: bool = False
    """Whether this deployment started Ray on this machine."""

    def route(self, model: str) -> str:
        """Returns the model's own route."""
        return f"{self.url.removesuffix('/v1')}/{model}"


def deploy(
    models: Sequence[ServedModel],
    endpoint: Endpoint,
    home: Path,
    reporter: Reporter,
    timeout: float = 900,
    *,
    open_finetuning: Opening,
) -> Served:
    """Deploys `models` beside those already served, and waits until all of them respond. A running endpoint keeps its
    settings except for those set in `endpoint`; its keys are those of `home`. `open_finetuning` must be a module-level
    function; the gateway calls it to get the use cases of the fine-tuning API.

    A deployed model of the same name is changed in place if only its adapters or number of replicas differ. Otherwise
    its replicas are replaced one by one; if there is room for both, each new one starts before an old one stops, so
    that one is always available. Raises ServeError if there is no room, if a model does not start (with the engine's
    reason), or if it is not ready after `timeout` seconds; the previous deployment is then restored.
    """
    began = time.monotonic()
    with _quiet():
        endpoint = endpoint.over(running) if (running := running_endpoint()) else endpoint
        if endpoint.too_open:
            raise ServeError(endpoint.too_open)
        url = start_endpoint(endpoint)
        before = status()
        holding = {name: replace(entry.model, replicas=entry.held, autoscale=None) for name, entry in before.items()}
        models, hosts = _place(models, holding)
        _check_names(models, before)
        for line in (*map(describe, models), *beyond_room(models, hosts, holding)):
            reporter.line(f"  {line}")
        changed = [
            model
            for model in models
            if model.name not in before or before[model.name].model != model or not before[model.name].ready
        ]
        try:
            beside = fits_beside(changed, hosts)
            _run(
                [
                    _gateway(endpoint, home, open_finetuning),
                    *(_application(model, endpoint, beside, before.get(model.name)) for model in changed),
                ]
            )
            _wait([model.name for model in changed], reporter, began, timeout)
        except BaseException as error:
            _restore(changed, before, endpoint, reporter, interrupted=isinstance(error, KeyboardInterrupt))
            raise
    return Served(url, time.monotonic() - began, tuple(models), endpoint)


def stop(names: Sequence[str], reporter: Reporter) -> None:
    """Removes models once their requests in progress have finished. Raises ServeError for a name that is not
    deployed."""
    with _quiet():
        deployed_now = status()
        if unknown := [name for name in names if name not in deployed_now]:
            raise ServeError(f"no model {unknown[0]} is served here; served are: {', '.join(deployed_now) or 'none'}")
        reporter.line(f"Stopping {', '.join(names)}.")
        _delete([directory.app_name(name) for name in names], reporter)


def stop_all(reporter: Reporter) -> None:
    """Removes all models and the endpoint once the requests in progress have finished."""
    from ray import serve

    with _quiet():
        reporter.line("Stopping all models and the endpoint.")
        drain()
        _delete([*map(directory.app_name, status()), GATEWAY], reporter)
        if not serve.status().applications:  # this cluster may serve other applications
            serve.shutdown()


def status() -> dict[str, Deployed]:
    """Returns the models deployed on the connected Ray by name; empty if Ray Serve is not running."""
    client = _client()
    return directory.deployed(client.get_serve_details()) if client else {}


def on_nodes() -> dict[str, list[str]]:
    """Returns the models with replicas on each node of the connected Ray, by node id."""
    client = _client()
    return directory.on_nodes(client.get_serve_details()) if client else {}


def running_endpoint() -> Endpoint | None:
    """Returns the endpoint of the connected Ray, or None."""
    client = _client()
    return directory.endpoint(client.get_serve_details()) if client else None


def stats() -> dict[str, dict[str, float]]:
    """Returns the gateway's counters for each model; empty if no gateway responds."""
    from ray import serve

    with _quiet():
        try:
            found: dict[str, dict[str, float]] = (
                serve.get_deployment_handle(GATEWAY, GATEWAY).stats.remote().result(timeout_s=5)
            )
        except Exception:  # the gateway is starting, restarting or absent
            return {}
        return found


def drain() -> int:
    """Rejects new requests and waits until those in progress have finished; returns how many were not finished within a
    request's time limit."""
    from ray import serve

    with _quiet():
        try:
            seconds = _longest()
            app = serve.status().applications.get(GATEWAY)
            if app is None or not app.deployments[GATEWAY].replica_states.get("RUNNING"):  # it accepts no requests
                return 0
            return int(
                serve.get_deployment_handle(GATEWAY, GATEWAY).drain.remote(seconds).result(timeout_s=seconds + 10)
            )
        except Exception:  # without a gateway nothing is in progress
            return 0


def url() -> str | None:
    """Returns the base of the OpenAI API, or None if Ray Serve is not running."""
    client = _client()
    return _url(client.http_config) if client else None


def start_endpoint(endpoint: Endpoint) -> str:
    """Starts Ray Serve if it is not running; returns the base of its API. Raises ServeError if it cannot listen at the
    host and port of `endpoint`."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    client = _client()
    if client is None:
        check_port(endpoint.host, endpoint.port)
        serve.start(
            proxy_location="HeadOnly" if endpoint.proxies == "head" else "EveryNode",
            http_options=HTTPOptions(
                host=endpoint.host,
                port=endpoint.port,
                keep_alive_timeout_s=75,
                ssl_certfile=str(endpoint.tls_certificate) if endpoint.tls_certificate else None,
                ssl_keyfile=str(endpoint.tls_key) if endpoint.tls_key else None,
            ),
        )
        client = _client()
    http = client.http_config
    if (http.host, http.port) != (endpoint.host, endpoint.port):
        raise ServeError(
            f"Ray Serve runs already and answers at {http.host}:{http.port}, not at {endpoint.host}:{endpoint.port}: "
            "keep endpoint.host and endpoint.port, or stop it first (llm-ray serve stop --all)"
        )
    return _url(http)


def _place(models: Sequence[ServedModel], holding: dict[str, ServedModel]) -> tuple[list[ServedModel], list[Node]]:
    """Returns the models with their cores decided, and the hosts. Raises ServeError if one does not fit.

    Ray reports the resources of a replica that has just ended as free after a short delay, which this waits for.
    """
    end = time.monotonic() + _SETTLES
    while True:
        hosts = nodes()
        try:
            return place(models, hosts, holding), hosts
        except ServeError:
            if time.monotonic() > end or not _fit_alone(models, hosts):
                raise
        time.sleep(_POLL)


def _fit_alone(models: Sequence[ServedModel], hosts: Sequence[Node]) -> bool:
    """Returns whether these models would fit on the cluster if nothing else ran there."""
    try:
        place(models, [replace(host, free_cpus=host.cpus, free_memory=host.memory) for host in hosts], {})
    except ServeError:
        return False
    return True


def nodes() -> list[Node]:
    """Returns the hosts of the connected Ray with their cores and memory."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(
            node["NodeManagerHostname"],
            node["Resources"].get("CPU", 0),
            node["Resources"].get("memory", 0),
            free.get(node["NodeID"], {}).get("CPU", 0),
            free.get(node["NodeID"], {}).get("memory", 0),
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    ]


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a port that is currently unused."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises ServeError if it is not possible to listen at `port`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another (--port, or endpoint.port in "
                "the conf)"
            ) from error


def root_cause(message: str) -> str:
    """Returns the root cause in a traceback reported by Serve: the last error with a message of its own, with the
    details of pydantic's validation errors."""
    found = [match for match in _ERROR_LINE.finditer(message) if not match[2].startswith(_EMPTY)]
    if not found:
        return message.strip().splitlines()[-1] if message.strip() else "none given (see llm-ray serve logs)"
    what = _ADVICE.sub("Raise kv_cache_gib, or lower max_model_len.", found[-1][2].strip())
    if re.search(r"\d+ validation errors? for \w+$", what):
        details = re.findall(
            r"^\s*(?:Value error, |Assertion failed, )?(\S.*?) \[type=", message[found[-1].end() :], re.MULTILINE
        )
        what = "; ".join(details) or what
    return f"{found[-1][1].rpartition('.')[2]}: {what}"


# Applications ---------------------------------------------------------------------------------------------------------


def _application(model: ServedModel, endpoint: Endpoint, beside: bool, old: Deployed | None) -> Any:
    """Returns the model as a Serve application that replaces `old`; `beside` tells whether there is room for one more
    replica during the replacement."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig

    resources = {"CPU": model.cpus, "memory": model.memory_bytes}
    options: dict[str, Any] = {"num_replicas": model.replicas}
    if scale := model.autoscale:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.min,
                # At least one, to find out now whether the model starts, and as many as the current load requires.
                initial_replicas=min(max(scale.min, 1, old.wanted if old else 0), scale.max),
                max_replicas=scale.max,
                target_ongoing_requests=scale.target or max(1, model.max_batch / 2),
                upscale_delay_s=2,
                downscale_delay_s=scale.idle_s,
                downscale_to_zero_delay_s=scale.idle_s,
                metrics_interval_s=1,
                look_back_period_s=min(10, max(2, scale.idle_s)),
            )
        }
    deployment = serve.deployment(
        ModelReplica,
        name=DEPLOYMENT,
        user_config=directory.user_config(model),
        max_ongoing_requests=model.max_batch,
        max_queued_requests=model.max_queue,
        max_constructor_retry_count=_STARTS,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=endpoint.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        max_surge_percent=1 if beside else 0,  # percent of the replicas, rounded up: one
        placement_group_bundles=[resources],
        ray_actor_options={
            "num_cpus": model.cpus,
            "memory": model.memory_bytes,
            **({"runtime_env": {"env_vars": environment}} if (environment := start_environment(model)) else {}),
        },
        **options,
    )
    return serve.RunTarget(
        _versioned(deployment, model.version()).bind(_constant(model)),
        name=directory.app_name(model.name),
        route_prefix=None,
    )


def _constant(model: ServedModel) -> ServedModel:
    """Returns the model without what running replicas can adopt, as the argument that replicas are started with."""
    return replace(model, replicas=1, autoscale=None)


def _gateway(endpoint: Endpoint, home: Path, open_finetuning: Opening) -> Any:
    from ray import serve

    deployment = serve.deployment(
        serve.ingress()(Gateway),
        name=GATEWAY,
        user_config={
            "endpoint": endpoint.model_dump(mode="json"),
            "protection": Protection.of(endpoint, home).to_json(),
            "home": str(home),
        },
        num_replicas=1,
        max_ongoing_requests=10_000,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=endpoint.request_timeout_s,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
    )
    return serve.RunTarget(
        _versioned(deployment, llm_ray.__version__).bind(open_finetuning), name=GATEWAY, route_prefix="/"
    )


def _versioned(deployment: Any, version: str) -> Any:
    """Returns the deployment with a version of its own: otherwise Serve generates a new one at each deployment and
    would replace all replicas when any option changes."""
    digest = hashlib.sha256(json.dumps([llm_ray.__version__, version]).encode()).hexdigest()[:16]
    return deployment.options(version=digest, _internal=True)


def _run(targets: list[Any]) -> None:
    from ray import serve

    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _delete(apps: Sequence[str], reporter: Reporter) -> None:
    """Deletes applications and waits until their replicas have finished their requests. Raises ServeError."""
    from ray import serve

    within = _longest() + _GRACE
    for app in apps:
        serve.delete(app, _blocking=False)
    began = time.monotonic()
    with reporter.bar("stopping", total=len(apps)) as bar:
        while left := [app for app in apps if app in serve.status().applications]:
            bar.update(len(apps) - len(left), len(apps), f"{time.monotonic() - began:.0f} s")
            if time.monotonic() - began > within:
                raise ServeError(f"{', '.join(left)} did not stop within {within:.0f} s: see llm-ray serve status")
            time.sleep(_POLL)
        bar.update(len(apps), len(apps))


def _check_names(models: Sequence[ServedModel], before: dict[str, Deployed]) -> None:
    owner = {
        called: name
        for name, entry in before.items()
        if name not in {model.name for model in models}
        for called in (name, name.replace("/", "--"), *entry.model.adapters)
    }
    for model in models:
        for called in (model.name, model.name.replace("/", "--"), *model.adapters):
            if called in owner and owner[called] != model.name:
                raise ServeError(
                    f"the name {called} is used by the deployed model {owner[called]}: choose another, or stop that "
                    "model first"
                )


def _restore(
    changed: Sequence[ServedModel],
    before: dict[str, Deployed],
    endpoint: Endpoint,
    reporter: Reporter,
    interrupted: bool,
) -> None:
    """Restores the deployment that preceded a failed one."""
    with contextlib.suppress(Exception):  # report only the original failure
        if old := [before[model.name].model for model in changed if model.name in before]:
            _run([_application(model, endpoint, True, before[model.name]) for model in old])
    new = {directory.app_name(model.name): model.name for model in changed if model.name not in before}
    if left := _undo(list(new), _AT_ONCE if interrupted else _GRACE):
        names = " ".join(new[app] for app in left)
        reporter.line(f"  {names} could not be undone: llm-ray serve stop {names}")


def _undo(apps: Sequence[str], seconds: float) -> list[str]:
    """Deletes applications of a cancelled deployment; returns those that still exist after `seconds`.

    Replicas of applications that are not ready are killed: they serve no requests, and Serve would let them load,
    holding their cores, for as long as a request may take. The controller is polled because the last call is lost if
    this process ends right after it.
    """
    from ray import serve

    end = time.monotonic() + seconds
    left = list(apps)
    ready: set[str] | None = None
    while left:
        with contextlib.suppress(Exception):  # Ray is busy or shutting down
            present = {
                app: details for app, details in _client().get_serve_details()["applications"].items() if app in left
            }
            ready = {app for app in present if present[app]["status"] == "RUNNING"} if ready is None else ready
            for app, details in present.items():
                if details["status"] != "DELETING":
                    serve.delete(app, _blocking=False)
                if app not in ready:
                    _kill_replicas(details)
            left = [app for app in present if not (app in ready and present[app]["status"] == "DELETING")]
        if time.monotonic() > end:
            break
        time.sleep(_POLL)
    return left


def _kill_replicas(app: dict[str, Any]) -> None:
    import ray
    from ray.serve._private.constants import SERVE_NAMESPACE

    for deployment in app["deployments"].values():
        for replica in deployment["replicas"]:
            with contextlib.suppress(ValueError):  # already gone
                ray.kill(ray.get_actor(replica["actor_name"], namespace=SERVE_NAMESPACE), no_restart=True)


def _wait(names: Sequence[str], reporter: Reporter, began: float, timeout: float) -> None:
    """Waits until the gateway and the models are running. Raises ServeError."""
    from ray import serve

    wanted = {directory.app_name(name): name for name in names} | {GATEWAY: "HTTP"}
    with reporter.bar("starting", total=len(wanted)) as bar:
        while True:
            apps = serve.status().applications
            waiting = [called for app, called in wanted.items() if app not in apps or apps[app].status != "RUNNING"]
            bar.update(
                len(wanted) - len(waiting), len(wanted), f"{', '.join(waiting)} {time.monotonic() - began:.0f} s"
            )
            if not waiting:
                return
            for app, called in wanted.items():
                if app in apps and (message := _failure(apps[app])):
                    raise ServeError(f"{called} could not be deployed: {root_cause(message)}")
            if time.monotonic() - began > timeout:
                reasons = "\n".join(
                    d.message for app in wanted if app in apps for d in apps[app].deployments.values()
                ).strip()
                raise ServeError(
                    f"{', '.join(waiting)} did not start within {timeout:.0f} s: raise --timeout, or see llm-ray "
                    f"serve logs {names[0] if names else 'gateway'}"
                    + (f". Last message: {root_cause(reasons)}" if reasons else "")
                )
            time.sleep(_START_POLL)


def _longest() -> float:
    """Returns the time limit of a request, in seconds."""
    return (running_endpoint() or Endpoint()).request_timeout_s


def _failure(app: Any) -> str | None:
    """Returns Serve's messages about a deployment that cannot succeed; constructor errors count at their first
    occurrence."""
    messages = "\n".join([app.message, *(d.message for d in app.deployments.values())])
    broken = _FAILED_TO_START in messages and "ActorDiedError" not in messages
    return messages if broken or app.status == "DEPLOY_FAILED" else None


def _client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _url(http: Any) -> str:
    host = "127.0.0.1" if http.host in ("0.0.0.0", "::") else http.host  # noqa: S104
    return f"{'https' if http.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{http.port}/v1"


def _quiet() -> AbstractContextManager[None]:
    """Silences Serve's own output on stderr."""
    return _LOGGING.use(None, _without_warnings)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
