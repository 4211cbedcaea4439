"""The learning rate schedule, and which weights decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm_ray.conf.finetune import FinetuneConf, Lora, Tuning
from llm_ray.train.optimizer import learning_rate, make_optimizer


def conf(**training: Any) -> FinetuneConf:
    return FinetuneConf.model_validate(
        {
            "name": "t",
            "model": {"base": "b"},
            "data": {"train": "x.jsonl"},
            "training": {"learning_rate": 1.0} | training,
        }
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warms_up_to_the_full_rate_and_never_above(schedule: str) -> None:
    rates = [learning_rate(conf(schedule=schedule, warmup=4), step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(rates) == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert (rates[-1] == 1.0) == (schedule == "constant")
    assert rates[-1] > 0


def test_warmup_is_a_share_below_one_and_steps_from_one() -> None:
    assert [learning_rate(conf(warmup=0.5, schedule="constant"), step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate(conf(warmup=0), 0, 10) == 1.0


def test_warmup_longer_than_training_leaves_a_step_at_the_full_rate() -> None:
    assert learning_rate(conf(warmup=100), 2, 3) == 1.0


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    module[2].requires_grad_(False)
    decaying, others = make_optimizer(module, conf(weight_decay=0.1)).param_groups
    assert [tuple(p.shape) for p in decaying["params"]] == [(3, 3)]
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert len(others["params"]) == 3


def test_the_b_matrices_of_adapters_learn_at_a_multiple_of_the_rate() -> None:
    """LoRA+. The optimizer state in checkpoints is the same as without it."""
    module = nn.Module()
    module.lora_A, module.lora_B = (nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)}) for _ in "AB")
    module.whole = nn.Linear(2, 2)
    tuning = Tuning(lora=Lora(loraplus_lr_ratio=16))
    optimizer = make_optimizer(nn.ModuleDict({"layer": module}), conf().model_copy(update={"tuning": tuning}))
    optimizer.set_rate(0.5)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: rates[parameter] for name, parameter in module.named_parameters()} == {
        "lora_A.default.weight": 0.5,
        "lora_B.default.weight": 8.0,
        "whole.weight": 0.5,
        "whole.bias": 0.5,
    }
    assert optimizer.param_groups[0].keys() == torch.optim.AdamW([nn.Parameter(torch.ones(1))]).param_groups[0].keys()
