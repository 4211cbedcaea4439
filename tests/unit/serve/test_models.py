"""What a model needs of its host, from its own configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_ray.serve import models
from llm_ray.serve.models import ServedModel, choose_dtype, kv_cache_bytes, longest


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
    assert longest(ServedModel("m", _folder(tmp_path, max_position_embeddings=2048))) == 2048
    assert longest(ServedModel("m", _folder(tmp_path, max_position_embeddings=131072))) == 8192
    assert longest(ServedModel("m", _folder(tmp_path), max_model_len=16000)) == 16000


def test_the_cache_holds_two_of_the_longest_and_at_least_16384_tokens(tmp_path: Path) -> None:
    a_token = 2 * 30 * 3 * 64 * 4
    assert kv_cache_bytes(ServedModel("m", _folder(tmp_path), max_model_len=512), "fp32") == 16384 * a_token
    assert kv_cache_bytes(ServedModel("m", _folder(tmp_path), max_model_len=16384), "bf16") == 32768 * a_token // 2


def test_the_cache_is_as_large_as_asked_for(tmp_path: Path) -> None:
    assert kv_cache_bytes(ServedModel("m", tmp_path, kv_cache_gib=0.25), "fp32") == 2**28


def test_a_head_dimension_of_its_own_and_a_language_part_are_read(tmp_path: Path) -> None:
    text = {"num_attention_heads": 8, "num_hidden_layers": 2, "hidden_size": 512, "head_dim": 128, "max_position_embeddings": 1024}
    model = ServedModel("m", _folder(tmp_path, text_config=text))
    assert longest(model) == 1024
    assert kv_cache_bytes(model, "fp32") == 16384 * 2 * 2 * 8 * 128 * 4


def test_weights_in_fp32_are_not_rounded_unasked(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "cpu_flags", lambda: frozenset({"amx_bf16", "amx_tile"}))
    assert choose_dtype(ServedModel("m", smollm2)) == "fp32"
    assert choose_dtype(ServedModel("m", smollm2, dtype="bf16")) == "bf16"
