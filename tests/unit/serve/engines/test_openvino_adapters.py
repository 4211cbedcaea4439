"""The factor of each layer of an adapter, as PEFT has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_ray.serve.engines.openvino_adapters import scale

SETTINGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 12},
    {"r": 4, "use_rslora": True},
    {"r": 8, "rank_pattern": {"0": 2}, "alpha_pattern": {"1": 32}},
    {"r": 8, "alpha_pattern": {"^inner.1": 3, "0|1": 5}, "use_rslora": True},
]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_layer_has_the_factor_that_peft_gives_it(settings: dict[str, Any]) -> None:
    config = LoraConfig(target_modules=["0", "1"], **settings)
    model = get_peft_model(Model(), config)
    for number in ("0", "1"):
        layer = model.get_submodule(f"base_model.model.inner.{number}")
        found = scale(config.to_dict(), f"inner.{number}", layer.r["default"])
        assert found == pytest.approx(layer.scaling["default"])
