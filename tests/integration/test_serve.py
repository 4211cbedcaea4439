"""Serving the real model on real Ray, asked by the real client."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from llm_ray.cluster import local_ray
from llm_ray.console import Reporter
from llm_ray.errors import ModelError, ServeError
from llm_ray.serve.deploy import Endpoint, deploy, undeploy
from llm_ray.serve.models import ServedModel

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("cores")))  # cores are claimed there: other tests' claims do not count
        with local_ray(2):
            yield


def test_a_folder_that_is_no_model_is_refused_at_once(ray: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        deploy([ServedModel("m", tmp_path)], Reporter())


def test_the_engines_reason_is_told(ray: None, smollm2: Path) -> None:
    with pytest.raises(ServeError, match=r"tiny could not be deployed: ValueError: .*KV cache"):
        deploy([ServedModel("tiny", smollm2, 1, 8192, 0.01)], Reporter())


@pytest.fixture(scope="module")
def endpoint(ray: None, smollm2: Path) -> Iterator[Endpoint]:
    """The same weights under two names, a core each."""
    yield deploy([ServedModel(name, smollm2, 1, 512, 0.125) for name in ("left", "right.2")], Reporter())
    undeploy()


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=endpoint.url, api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as made:
        yield made


def test_both_models_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"left", "right.2"}


@pytest.mark.parametrize("model", ["left", "right.2"])
def test_a_model_answers(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=16)  # type: ignore[arg-type]
    assert "Paris" in str(reply.choices[0].message.content)
    assert reply.model == model


def test_an_answer_streams_in_pieces(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model="left", messages=QUESTION, temperature=0, max_tokens=16, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 1
    assert "Paris" in "".join(pieces)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=QUESTION)  # type: ignore[arg-type]


def test_a_prompt_too_long_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="512"):
        client.chat.completions.create(model="left", messages=[{"role": "user", "content": "word " * 600}])


def test_the_endpoint_listens_on_loopback_alone(endpoint: Endpoint) -> None:
    port = int(endpoint.url.rsplit(":", 1)[1].removesuffix("/v1"))
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port}
    assert listening == {"127.0.0.1"}


def test_each_engine_computes_on_cores_of_its_own(endpoint: Endpoint) -> None:
    workers = [p for p in psutil.Process().children(recursive=True) if "VLLM::Worker" in " ".join(p.cmdline())]
    bound = [tuple(worker.cpu_affinity()) for worker in workers]
    assert [len(cores) for cores in bound] == [1, 1]
    assert bound[0] != bound[1]


def test_the_command_serves_until_it_is_interrupted(smollm2: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("llm-ray")),
        "serve",
        "--model",
        str(smollm2),
        "--name",
        "asked",
        "--port",
        str(port),
        "--max-model-len",
        "512",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as served:
        assert served.stderr
        said = []
        for line in served.stderr:
            said.append(line)
            if "Ctrl-C" in line:
                break
        assert f"Ready at http://127.0.0.1:{port}/v1" in "".join(said)
        started = psutil.Process(served.pid).children(recursive=True)
        assert any("VLLM" in process.name() or "VLLM" in " ".join(process.cmdline()) for process in started)
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
        ) as client:
            assert [model.id for model in client.models.list()] == ["asked"]
        served.send_signal(signal.SIGINT)
        served.stderr.read()
        assert served.wait(60) == 0
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
