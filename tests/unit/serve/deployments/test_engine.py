"""Which engine `engine: auto` comes to, and what is served where a model cannot be converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_ray.conf.section import Paths
from llm_ray.conf.serve import ModelServing, ServeConf
from llm_ray.errors import ModelError
from llm_ray.models.convert import converted
from llm_ray.models.load import fingerprint
from llm_ray.progress import Kind, Silent
from llm_ray.serve.deployments.engine import choose_engine
from llm_ray.serve.deployments.plan import estimate, plan

Tool = Callable[[str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Makes an environment for conversion whose interpreter is this script, and names it to llm-ray."""
    folder = tmp_path / "environment"
    monkeypatch.setenv("LLM_RAY_CONVERT_ENV", str(folder))

    def make(script: str) -> None:
        (folder / "bin").mkdir(parents=True)
        for name in ("python", "optimum-cli"):
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / "bin" / name).chmod(0o755)

    return make


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str, *, kind: Kind = "plain") -> None:
        self.said.append(text)


def _conf(model: Path, tmp_path: Path, **settings: Any) -> ServeConf:
    return ServeConf(
        models={"m": ModelServing(model=str(model), **settings)},
        paths=Paths(models=tmp_path / "models", runs=tmp_path / "runs"),
    )


def _converted(source: Path, registry: Path, weights: Any = "int8") -> Path:
    """A conversion as `model convert` makes it, without weights to speak of."""
    folder = converted(source, weights, registry)
    folder.mkdir(parents=True)
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    kind = {"int8": "u8", "int4": "u4"}[weights]
    (folder / "openvino_model.xml").write_text(
        f'<net><data element_type="{kind}" shape="2, 4" offset="0" size="8" /></net>'
    )
    (folder / "openvino_model.bin").write_bytes(b"12345678")
    (folder / "llm-ray.json").write_text(
        json.dumps({"source": str(source), "fingerprint": fingerprint(source), "weights": weights})
    )
    return folder


@pytest.mark.parametrize(
    ("settings", "engine", "reason"),
    [
        ({}, "openvino", "fastest"),
        ({"weights": "int4"}, "openvino", "int4"),
        ({"adapters": {"a": "run"}}, "vllm", "adapters"),
        ({"adapters": {"a": "run"}, "weights": "int8"}, "openvino", "int8"),
        ({"compile": True}, "vllm", "compile"),
        ({"precision": "fp32"}, "vllm", "precision fp32"),
        ({"engine_options": {"enable_prefix_caching": False}}, "vllm", "engine_options"),
        ({"engine": "vllm"}, "vllm", "conf"),
        ({"engine": "transformers"}, "transformers", "conf"),
    ],
)
def test_the_fastest_that_can_do_what_is_asked(
    smollm2: Path, tmp_path: Path, tool: Tool, settings: dict[str, Any], engine: str, reason: str
) -> None:
    tool("exit 1")
    choice = choose_engine(ModelServing(model="m", **settings), smollm2, tmp_path / "models")
    assert choice.engine == engine
    assert reason in choice.reason


def test_a_model_with_code_of_its_own_is_for_vllm(smollm2: Path, tmp_path: Path, tool: Tool) -> None:
    tool("exit 1")
    asked = ModelServing(model="m", trust_remote_code=True, trusted_models=("m",))
    assert choose_engine(asked, smollm2, tmp_path).engine == "vllm"


def test_a_model_that_makes_vectors_is_for_vllm(smollm2: Path, tmp_path: Path, tool: Tool) -> None:
    tool("exit 1")
    folder = tmp_path / "vectors"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    choice = choose_engine(ModelServing(model="m"), folder, tmp_path)
    assert (choice.engine, choice.reason) == ("vllm", "for embeddings")


def test_without_the_environment_of_conversion_the_reason_says_what_makes_it(smollm2: Path, tmp_path: Path) -> None:
    choice = choose_engine(ModelServing(model="m"), smollm2, tmp_path / "models")
    assert choice.engine == "vllm"
    assert "make setup-convert" in choice.reason


def test_what_has_been_converted_is_served_so_without_that_environment(smollm2: Path, tmp_path: Path) -> None:
    folder = _converted(smollm2, tmp_path / "models", "int4")
    asked = ModelServing(model=str(smollm2))
    assert choose_engine(asked, smollm2, tmp_path / "models").engine == "openvino"
    assert choose_engine(asked, folder, tmp_path / "models").engine == "openvino"
    reporter = Lines()
    (model,) = plan(_conf(smollm2, tmp_path), reporter)
    assert (model.engine, model.path) == ("openvino", folder)
    assert reporter.said == ["m: engine openvino (auto: the fastest on CPUs, and the model is converted)"]


def test_a_model_that_cannot_be_converted_is_served_as_it_is(smollm2: Path, tmp_path: Path, tool: Tool) -> None:
    tool("echo 'ValueError: Trying to export a smol model, that is a custom or unsupported architecture'; exit 1")
    reporter = Lines()
    (model,) = plan(_conf(smollm2, tmp_path), reporter)
    assert (model.engine, model.path, model.precision) == ("vllm", smollm2, "fp32")
    assert any("engine vllm instead: " in line and "does not export text models" in line for line in reporter.said)
    assert not list((tmp_path / "models").glob("smollm2*"))


def test_weights_that_were_asked_for_are_not_replaced_by_others(smollm2: Path, tmp_path: Path, tool: Tool) -> None:
    tool("exit 1")
    with pytest.raises(ModelError, match="could not be converted"):
        plan(_conf(smollm2, tmp_path, weights="int8"), Silent())


def test_an_estimate_converts_nothing(smollm2: Path, tmp_path: Path, tool: Tool) -> None:
    tool("exit 1")
    conf = _conf(smollm2, tmp_path)
    model = estimate("m", conf.models["m"], conf.paths, Silent())
    plain = estimate("m", ModelServing(model=str(smollm2), engine="vllm"), conf.paths, Silent())
    assert (model.engine, plain.engine) == ("openvino", "vllm")
    assert model.memory_bytes < plain.memory_bytes
