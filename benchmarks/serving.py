"""Serving: output tokens/s over HTTP against the same engine called directly, and against vLLM's CPU engine with its
defaults; seconds to deploy."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.table import comparison
from benchmarks.vllm_floor import PROMPT, TOKENS
from llm_ray.app.api_service import open_service
from llm_ray.bench.load import Load, run_load
from llm_ray.cli.terminal import Terminal
from llm_ray.client.endpoint import parse
from llm_ray.client.prompts import Prompt
from llm_ray.cluster import local_ray
from llm_ray.conf.section import Paths, home
from llm_ray.conf.serve import Endpoint, ModelServing, ServeConf
from llm_ray.serve.deployments.deploy import deploy, free_port, stop_all
from llm_ray.serve.deployments.plan import plan
from llm_ray.serve.models import ServedModel

# Served configurations by their name in the figures.
ENGINES: dict[str, dict[str, Any]] = {
    "vllm fp32": {"engine": "vllm", "precision": "fp32"},
    "openvino fp32": {"engine": "openvino", "weights": "fp32", "precision": "fp32"},
    "openvino int8": {"engine": "openvino", "weights": "int8"},
}
_ROUNDS = 3
# `ray.serve.llm` with vLLM and default settings, deploy to first token, measured on two cores.
_AS_IT_COMES_SECONDS = 66.0


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures every engine over HTTP and directly, and the baseline, one after the other on all cores of this
    machine."""
    floor = _process("benchmarks.vllm_floor", str(model))
    ours: dict[str, dict[str, float]] = {}
    for name, options in ENGINES.items():
        conf = ServeConf(
            models={"m": ModelServing(model=str(model), max_model_len=2048, kv_cache_gib=1, **options)},
            paths=Paths(models=work / "models", runs=work / "runs"),
            endpoint=Endpoint(port=free_port()),
        )
        (served,), figures = plan(conf, Terminal()), {}
        began = time.monotonic()
        with local_ray():
            endpoint = deploy([served], conf.endpoint, home(), Terminal(), open_finetuning=open_service)
            _over_http(endpoint.url, 1, 1, tokens=1)
            figures["deploy to first token, s"] = time.monotonic() - began
            for count in (1, 16):
                figures[f"http {count}"] = max(_over_http(endpoint.url, count, count * _ROUNDS) for _ in range(2))
            stop_all(Terminal())
            decided = endpoint.models[0]
        figures |= {f"direct {count}": value for count, value in _direct(decided).items()}
        ours[name] = figures
    best = max(ours["vllm fp32"]["http 16"], ours["openvino fp32"]["http 16"])
    table = [
        comparison(
            f"{name}: 16 at once over HTTP, tokens/s, against directly",
            figures["http 16"],
            figures["direct 16"],
            "0.85 x, then 0.95 x",
        )
        for name, figures in ours.items()
    ]
    table += [
        comparison(
            "fp32, our best engine: 16 at once over HTTP, tokens/s, against vLLM offline",
            best,
            floor["16"],
            "1.2 x, then 1.5 x",
        ),
        comparison(
            "int8, one request at a time over HTTP, tokens/s, against vLLM fp32 offline",
            ours["openvino int8"]["http 1"],
            floor["1"],
            "2.5 x, then 3 x",
        ),
    ]
    table += [
        comparison(
            f"{name}: deploy to first token, s, against ray.serve.llm with defaults",
            figures["deploy to first token, s"],
            _AS_IT_COMES_SECONDS,
            "30 s, then 15 s",
        )
        for name, figures in ours.items()
    ]
    return {"ours": ours, "vllm offline": floor, "table": table}


def _over_http(url: str, concurrency: int, requests: int, tokens: int = TOKENS) -> float:
    prompts = (Prompt(f"{PROMPT} {i}.") for i in itertools.count(concurrency))
    load = Load(concurrency=concurrency, requests=requests, max_tokens=tokens, ignore_eos=True, completion=True)
    report = run_load(parse(url), "m", prompts, load)
    if report.failures:
        sys.exit(f"requests failed: {report.failures_by_kind}")
    return report.output_tokens_per_second


def _direct(model: ServedModel) -> dict[str, float]:
    return _process("benchmarks.direct", json.dumps(asdict(model), default=str))


def _process(module: str, argument: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", module, argument], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{module} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
