"""Deploying models on the running Ray, and taking them away.

with local_ray():
    endpoint = deploy([ServedModel("smollm2", folder)], Reporter())
    ...  # http://127.0.0.1:PORT/v1
    undeploy()
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_ray.console import Reporter
from llm_ray.errors import ServeError
from llm_ray.models.folder import check_folder
from llm_ray.serve.models import ServedModel

APP = "llm-ray"
_POLL = 0.2  # seconds
_ERROR_LINE = re.compile(r"((?:[a-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception)): (.+)")
# Errors that only say that another one happened elsewhere.
_EMPTY = ("Engine core initialization failed", "WorkerProc initialization failed", "Failed to start", "EngineCore failed")


@dataclass(frozen=True)
class Endpoint:
    """Where the models answer: `url` is the base of the OpenAI API, as in http://127.0.0.1:8000/v1."""

    url: str
    seconds: float
    """From the call to the moment all models were ready."""


def deploy(
    models: Sequence[ServedModel], reporter: Reporter, host: str = "127.0.0.1", port: int | None = None, timeout: float = 600
) -> Endpoint:
    """Serve exactly `models` on the connected Ray, and wait until all of them answer.

    `port` None: a free one. Raises ModelError for a folder that is no whole model, ServeError with the engine's reason when a model
    does not start, or is not ready after `timeout` seconds; nothing is left deployed then.
    """
    began = time.monotonic()
    for model in models:
        check_folder(model.path)
    with _quiet():
        from ray import serve

        from llm_ray.serve.app import build_app

        url = _start_http(host, port)
        try:
            serve.run_many(
                [serve.RunTarget(build_app(models), name=APP, route_prefix="/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            _wait(models, reporter, began, timeout)
        except BaseException as error:
            undeploy(wait=not isinstance(error, KeyboardInterrupt))
            raise
    return Endpoint(url, time.monotonic() - began)


def undeploy(wait: bool = True) -> None:
    """Take all models away; Ray Serve itself stays, as long as its Ray. Nothing happens where there is none."""
    from ray import serve
    from ray.serve.context import _get_global_client

    with _quiet():
        if _get_global_client(raise_if_no_controller_running=False):
            serve.delete(APP, _blocking=wait)


def _start_http(host: str, port: int | None) -> str:
    """Start Ray Serve unless it runs; returns the base of its API. Raises ServeError where it cannot answer at `port`."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        chosen = port or _free_port(host)
        check_port(host, chosen)
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=chosen))
        client = _get_global_client()
    http = client.http_config
    if port not in (None, http.port):
        raise ServeError(f"Ray Serve runs already and answers at port {http.port}: it cannot answer at {port} too")
    return f"http://{http.host}:{http.port}/v1"


def _wait(models: Sequence[ServedModel], reporter: Reporter, began: float, timeout: float) -> None:
    from ray import serve

    with reporter.bar("starting", total=len(models)) as bar:
        while True:
            app = serve.status().applications.get(APP)
            ready = {name for name, d in app.deployments.items() if d.status == "HEALTHY"} if app else set()
            waiting = [m.name for m in models if not any(name.endswith(f":{_deployment_name(m)}") for name in ready)]
            bar.update(len(models) - len(waiting), len(models), f"{', '.join(waiting) or 'HTTP'} {time.monotonic() - began:.0f} s")
            if app and app.status == "RUNNING":
                return
            if app and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                failed = [f"{name}: {d.message}" for name, d in app.deployments.items() if d.status in ("DEPLOY_FAILED", "UNHEALTHY")]
                reason = tell_reason("\n".join([app.message, *failed]), _engine_log())
                raise ServeError(f"{', '.join(waiting)} could not be deployed: {reason}")
            if time.monotonic() - began > timeout:
                raise ServeError(
                    f"{', '.join(waiting)} did not start within {timeout:.0f} s. The engine's last words: {tell_reason('', _engine_log())}"
                )
            time.sleep(_POLL)


def _deployment_name(model: ServedModel) -> str:
    return model.name.replace("/", "--").replace(".", "_")


def tell_reason(message: str, engine_log: str) -> str:
    """The most telling error: the root cause in the engine's own log where there is one, else the last of Serve's `message`."""
    for text in (engine_log, message):
        found = [f"{kind.rpartition('.')[2]}: {what.strip()}" for kind, what in _ERROR_LINE.findall(text) if not what.startswith(_EMPTY)]
        if found:
            return found[-1]
    return message.strip() or "none (see Ray's session logs)"


def _engine_log() -> str:
    import ray

    node = ray._private.worker._global_node
    folder = Path(node.get_logs_dir_path()) if node else None
    if folder is None or not folder.is_dir():
        return ""
    files = sorted(folder.glob("worker-*.err"), key=lambda f: f.stat().st_mtime) + sorted(
        folder.glob("worker-*.out"), key=lambda f: f.stat().st_mtime
    )
    return "\n".join(line for f in files for line in f.read_text(errors="replace").splitlines() if "EngineCore" in line or "Worker" in line)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another with --port, or leave it out for a free one"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Serve and vLLM tell their own story on stderr; what matters of it is said here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
