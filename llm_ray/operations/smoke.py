"""Smoke tests of training on all nodes and of serving. Both clean up and disturb nothing."""

from __future__ import annotations

import os
import secrets
import shutil
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_ray.operations.checks import Finding, finding

_SECONDS = 180.0  # time limit of a smoke test
_APP = "llm-ray-validate"


def train(workers: int, shared: Path) -> list[Finding]:
    """Trains a tiny model for one step with a worker per node; needs no free CPU, only memory."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from llm_ray.train.network import GlooConfig

    folder = shared / f".validate-{secrets.token_hex(4)}"
    trainer = TorchTrainer(
        _step,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, resources_per_worker={"memory": 1}, placement_strategy="STRICT_SPREAD"
        ),
        run_config=ray.train.RunConfig(name="train", storage_path=str(folder)),
        torch_config=GlooConfig(),
    )
    began = time.monotonic()
    try:
        hosts = _within(_SECONDS, lambda: trainer.fit().return_value)
    except Exception as error:  # any failure of training
        failures = getattr(error, "worker_failures", {})
        reason = _last_line(next(iter(failures.values()), error))
        fix = (
            "hosts must reach each other on all ports above 32768 (firewall), on the interface of their Ray address "
            "(ray_node_interface)"
        )
        return [finding("train", "all", reason, fix)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        finding(
            "train",
            "all",
            f"{workers} workers on {', '.join(hosts)} trained one step in {time.monotonic() - began:.0f} s",
        )
    ]


def _step() -> list[str]:
    """Runs a step on each worker, after which all must have the same weights. Returns the workers' hosts by rank."""
    import ray.train.torch
    import torch
    import torch.distributed as dist

    model = ray.train.torch.prepare_model(torch.nn.Linear(4, 1))
    rank, world = dist.get_rank(), dist.get_world_size()
    model(torch.full((2, 4), float(rank + 1))).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (os.uname().nodename, [p.tolist() for p in model.parameters()]))
    if any(weights != gathered[0][1] for _, weights in gathered):
        raise RuntimeError("the workers' weights differ after a step")
    return [host for host, _ in gathered]


def serve(host: str, port: int) -> list[Finding]:
    """Deploys a test application beside the served ones. If Serve does not run, it is started at `host` and `port` and
    stopped again."""
    from ray import serve
    from ray.serve.context import _get_global_client

    runs = _get_global_client(raise_if_no_controller_running=False) is not None
    began = time.monotonic()
    word = secrets.token_hex(8)
    try:
        answer = _within(_SECONDS, lambda: _ask(host, port, word))
    except Exception as error:  # any failure of serving
        fix = f"see ray list actors on the head, and the logs in Ray's session folder (serve/); is port {port} free?"
        return [finding("serve", "head", _last_line(error), fix)]
    finally:
        if runs:
            serve.delete(_APP)
        else:
            serve.shutdown()
    if answer != word:
        return [
            finding(
                "serve",
                "head",
                f"answered {answer[:40]!r}",
                "another application answers on that route: llm-ray serve status",
            )
        ]
    return [
        finding(
            "serve",
            "head",
            f"an application answered {time.monotonic() - began:.0f} s after its start, and was removed",
        )
    ]


def _ask(host: str, port: int, word: str) -> str:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from llm_ray.serve.deployments import deploy

    class Echo:
        async def __call__(self, request: Any) -> str:
            return str(request.query_params["word"])

    echo = serve.deployment(Echo, ray_actor_options={"num_cpus": 0})
    if deploy.url() is None:
        deploy.check_port(host, port)
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port))
    serve.run(echo.bind(), name=_APP, route_prefix=f"/{_APP}")
    base = (deploy.url() or "").removesuffix("/v1")
    # No certificate check: the endpoint is this host's own.
    context = ssl._create_unverified_context() if base.startswith("https:") else None  # noqa: S323
    with urllib.request.urlopen(f"{base}/{_APP}?word={word}", timeout=30, context=context) as response:  # noqa: S310
        return str(response.read().decode())


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Returns the result of `work`. Raises TimeoutError after `seconds`; the work then continues until this process
    ends."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = work()
        except BaseException as error:  # reraised in the caller
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not finished within {seconds:.0f} s")
    if "error" in result:
        raise result["error"]
    return result["value"]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
