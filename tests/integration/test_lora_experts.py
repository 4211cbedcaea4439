"""LoRA adapters on a mixture of experts, in vLLM's core."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.serve.deployments.adapters import check_adapter
from tests.integration import tiny
from tests.integration.lora import assert_right, expected, started


def test_a_mixture_of_experts_has_adapters_beside_its_experts(tmp_path: Path) -> None:
    """vLLM computes experts with adapters on GPUs alone, and ended with adapters anywhere."""
    base = tiny.mixture(tmp_path / "base", "mixtral")
    asked: dict[int, Path | None] = {0: None, 1: tiny.adapter(tmp_path / "attention", base, 1)}
    router = tiny.adapter(tmp_path / "router", base, 2, target_modules=["o_proj", "gate"])
    with started(base) as engine:
        assert_right(engine.ask(asked), {who: expected(base, folder, who) for who, folder in asked.items()})
        # vLLM calls Mixtral's router otherwise, and would leave the adapter on it out.
        with pytest.raises(ValueError, match=r"vLLM does not support adapters on model.layers.0.mlp.gate and others"):
            engine.load(2, router)
    experts = tiny.adapter(
        tmp_path / "experts", base, 3, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    with pytest.raises(ModelError, match=r"adapter a: .*changes experts \(model.layers.0.mlp.experts"):
        check_adapter("a", experts, base, Paths())
