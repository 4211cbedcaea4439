"""The real model behind one endpoint, started through the real command, for all tests of this folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.integration import tiny

LLM_RAY = Path(sys.executable).with_name("llm-ray")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The command, with a home of its own, so that no other deployment is met."""
    home = tmp_path_factory.mktemp("home")

    def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        # As on a host without a C++ compiler: vLLM's sampler would want one for logprobs.
        environment = {**os.environ, "LLM_RAY_HOME": str(home), "TMPDIR": str(home), "CXX": "/nowhere"}
        environment["LLM_RAY_CONVERT_ENV"] = "/nowhere"  # so that engine vllm serves
        return subprocess.run(
            [LLM_RAY, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=environment,
        )

    yield command
    command("serve", "stop", "--all")


@pytest.fixture(scope="package")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with random weights, large enough to change the answers."""
    return tiny.adapter(tmp_path_factory.mktemp("adapter"), smollm2, 0, std=0.2)


@pytest.fixture(scope="package")
def conf(smollm2: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, with the adapter `tuned` on it, and the same model once more as `team/other`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path_factory.mktemp("conf") / "serve.yaml"
    small = {"model": str(smollm2), "max_model_len": 512, "cpus": 1, "adapters": {"tuned": str(adapter)}}
    other = {"model": str(smollm2), "max_model_len": 256, "max_batch": 4, "kv_cache_gib": 0.2, "tools": "off"}
    file.write_text(
        json.dumps({"endpoint": {"port": port, "max_body_mib": 1}, "models": {"small": small, "team/other": other}})
    )
    return file


@pytest.fixture(scope="package")
def base(run: Run, conf: Path) -> str:
    """Where the endpoint is, without /v1."""
    deployed = run("serve", "deploy", "--config", str(conf))
    assert deployed.returncode == 0, deployed.stderr
    return f"http://127.0.0.1:{json.loads(conf.read_text())['endpoint']['port']}"


@pytest.fixture(scope="package")
def client(base: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which does not ask again by itself."""
    with openai.OpenAI(
        base_url=f"{base}/v1", api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as made:
        yield made


@pytest.fixture(scope="package")
def http(base: str) -> Iterator[httpx.Client]:
    """A bare client, for what OpenAI's does not do."""
    with httpx.Client(base_url=base, trust_env=False, timeout=120) as made:
        yield made
