"""What a model needs of its host, from its own configuration; and what makes it another one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llm_ray.conf.serve import Autoscale
from llm_ray.serve import directory
from llm_ray.serve.models import Adapter, ServedModel, kv_cache_bytes, longest, made_for, sampling, writes


def _folder(path: Path, **changes: object) -> Path:
    config = {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "max_position_embeddings": 8192,
    }
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def test_the_longest_request_is_the_models_at_most_8192(tmp_path: Path) -> None:
    assert longest(_folder(tmp_path, max_position_embeddings=2048), None) == 2048
    assert longest(_folder(tmp_path, max_position_embeddings=131072), None) == 8192
    assert longest(_folder(tmp_path), 16000) == 16000


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"n_positions": 1024}, 1024),  # GPT-2
        ({"max_seq_len": 2048}, 2048),  # MPT
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 32768),
        ({"n_embd": 64}, None),
    ],
    ids=str,
)
def test_what_a_model_was_made_for_is_read_under_each_of_its_names(
    config: dict[str, object], tokens: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert made_for(tmp_path) == tokens


def test_what_a_model_sets_of_sampling_is_what_differs_from_openai(tmp_path: Path) -> None:
    assert sampling(tmp_path) == {}
    settings = {
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": None,
        "max_new_tokens": 99,
        "eos_token_id": 2,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert sampling(tmp_path) == {"temperature": 0.6, "max_new_tokens": 99}


def test_the_cache_holds_two_of_the_longest_and_at_least_16384_tokens(tmp_path: Path) -> None:
    a_token = 2 * 30 * 3 * 64 * 4
    assert kv_cache_bytes(_folder(tmp_path), "fp32", 512) == 16384 * a_token
    assert kv_cache_bytes(_folder(tmp_path), "bf16", 16384) == 32768 * a_token // 2


def test_a_head_dimension_of_its_own_and_a_language_part_are_read(tmp_path: Path) -> None:
    text = {
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "hidden_size": 512,
        "head_dim": 128,
        "max_position_embeddings": 1024,
    }
    folder = _folder(tmp_path, text_config=text)
    assert longest(folder, None) == 1024
    assert kv_cache_bytes(folder, "fp32", 1024) == 16384 * 2 * 2 * 8 * 128 * 4


MODEL = ServedModel(
    "support/bot.1",
    Path("/models/a"),
    adapters={"fin": Adapter("/runs/fin", "1")},
    lora_rank=16,
    autoscale=Autoscale(max=2),
)


@pytest.mark.parametrize(
    ("change", "restart"),
    [
        ({"replicas": 2}, False),
        ({"autoscale": Autoscale(max=3)}, False),
        ({"adapters": {}}, False),
        ({"adapters": {"fin": Adapter("/runs/fin", "2")}}, False),
        ({"lora_rank": 32}, True),
        ({"identity": "other weights"}, True),
        ({"cpus": 4}, True),
        ({"max_model_len": 16}, True),
        ({"engine": "openvino"}, True),
    ],
    ids=str,
)
def test_a_replica_is_started_anew_for_what_it_cannot_take_over_live(change: dict[str, object], restart: bool) -> None:
    assert (dataclasses.replace(MODEL, **change).version() != MODEL.version()) is restart


def test_what_is_deployed_is_read_back_from_the_controllers_details() -> None:
    deployment = {
        "deployment_config": {"user_config": json.loads(json.dumps(directory.user_config(MODEL)))},
        "message": "",
        "replicas": [{"state": "RUNNING"}, {"state": "STARTING"}],
        "target_num_replicas": 2,
    }
    app = {
        "status": "DEPLOYING",
        "message": "starts",
        "last_deployed_time_s": 5.5,
        "deployments": {"model": deployment},
    }
    others = {"other": {"deployments": {"model": deployment}}, directory.GATEWAY: {"deployments": {"llm-ray": {}}}}
    (found,) = directory.deployed({"applications": {directory.app_name(MODEL.name): app, **others}}).values()
    assert found.model == MODEL
    assert (found.replicas, found.wanted, found.ready, found.created, found.message) == (1, 2, True, 5, "starts")


def test_a_cluster_without_serve_has_no_models() -> None:
    assert directory.deployed({}) == {}
    assert directory.deployed({"applications": {}}) == {}


@pytest.mark.parametrize(
    ("architecture", "modules", "options", "text"),
    [
        ("LlamaForCausalLM", False, {}, True),
        ("GPT2LMHeadModel", False, {}, True),
        ("BertModel", False, {}, False),
        ("Qwen3ForCausalLM", True, {}, False),
        ("LlamaForCausalLM", False, {"runner": "pooling"}, False),
        ("Qwen3ForCausalLM", True, {"runner": "generate"}, True),
    ],
)
def test_models_that_make_vectors_are_told_from_those_that_write(
    architecture: str, modules: bool, options: dict[str, str], text: bool, tmp_path: Path
) -> None:
    _folder(tmp_path, architectures=[architecture])
    if modules:
        (tmp_path / "modules.json").write_text("[]")
    assert writes(tmp_path, options) is text
