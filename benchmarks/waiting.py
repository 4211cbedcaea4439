"""Latencies of serving: from a request to a model scaled to zero to its answer, and from a client's disconnect to the
end of its generation."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.table import comparison
from llm_ray.app.api_service import open_service
from llm_ray.cli.terminal import Terminal
from llm_ray.cluster import local_ray
from llm_ray.conf.section import Paths, home
from llm_ray.conf.serve import Autoscale, Endpoint, ModelServing, ServeConf
from llm_ray.serve.deployments.deploy import deploy, free_port, stop_all
from llm_ray.serve.deployments.plan import plan

_TOKENS = 1500
_IDLE = 0.2  # of a core: maximum CPU use of an idle replica
_LOOK = 0.1  # seconds


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures engine vllm in fp32 on all cores of this machine."""
    conf = ServeConf(
        models={
            "m": ModelServing(
                model=str(model), max_model_len=2048, kv_cache_gib=1, autoscale=Autoscale(min=0, max=1, idle_s=5)
            )
        },
        paths=Paths(models=work / "models", runs=work / "runs"),
        endpoint=Endpoint(port=free_port()),
    )
    (served,) = plan(conf, Terminal())
    began = time.monotonic()
    with (
        local_ray(),
        httpx.Client(base_url=f"http://127.0.0.1:{conf.endpoint.port}", timeout=300, trust_env=False) as client,
    ):
        deploy([served], conf.endpoint, home(), Terminal(), open_finetuning=open_service)
        _answer(client, 1)
        deployed = time.monotonic() - began
        while _replica():
            time.sleep(_LOOK)
        woken = _answer(client, 1)
        whole = _answer(client, _TOKENS)
        gone = _gone(client)
        stop_all(Terminal())
    table = [
        comparison(
            "scaled to zero: request to first token, s, against starting Ray and deploying", woken, deployed, ""
        ),
        comparison(
            f"client disconnects: seconds until generation stops, against all {_TOKENS} tokens", gone, whole, ""
        ),
    ]
    return {"ours": {"woken": woken, "gone": gone}, "table": table}


def _body(tokens: int) -> dict[str, Any]:
    return {"model": "m", "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def _answer(client: httpx.Client, tokens: int) -> float:
    began = time.monotonic()
    client.post("/v1/completions", json=_body(tokens)).raise_for_status()
    return time.monotonic() - began


def _gone(client: httpx.Client) -> float:
    """Returns the seconds from the client's disconnect in the middle of a stream until the replica is idle."""
    with client.stream("POST", "/v1/completions", json=_body(_TOKENS) | {"stream": True}) as answer:
        next(answer.iter_lines())
    began, (replica,) = time.monotonic(), _replica()
    while replica.cpu_percent(_LOOK) > 100 * _IDLE:
        pass
    return time.monotonic() - began


def _replica() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # the process has just ended
            if "ServeReplica:model:m" in " ".join(process.cmdline()):
                found.append(process)
    return found
