"""AdamW over the trainable weights, and the learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import as_run


class Optimizer(torch.optim.AdamW):
    """AdamW whose parameter groups learn at multiples of one rate. `factors`: one per group; not part of the state that
    checkpoints store."""

    def __init__(self, groups: list[dict[str, Any]], factors: list[float], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._factors = factors

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate of the next step."""
        for group, factor in zip(self.param_groups, self._factors, strict=True):
            group["lr"] = rate * factor


def make_optimizer(module: nn.Module, conf: FinetuneConf) -> Optimizer:
    """Returns AdamW with weight decay on matrices only, and `tuning.lora.loraplus_lr_ratio` times the learning rate for
    the adapters' B matrices."""
    ratio = conf.tuning.lora.loraplus_lr_ratio if conf.tuning.method == "lora" else 1.0
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = (ratio if ".lora_B." in name else 1.0, parameter.ndim >= 2)
            groups.setdefault(group, []).append(parameter)
    kinds = sorted(groups, key=lambda group: (group[0], not group[1]))
    return Optimizer(
        [{"params": groups[kind], "weight_decay": conf.training.weight_decay if kind[1] else 0.0} for kind in kinds],
        [factor for factor, _ in kinds],
        lr=as_run(conf.training.learning_rate),
        betas=conf.training.betas,
        eps=conf.training.eps,
        fused=True,
    )


def learning_rate(conf: FinetuneConf, step: int, total_steps: int) -> float:
    """Returns the learning rate of optimizer step `step` (from 0) of `total_steps`."""
    training, highest = conf.training, as_run(conf.training.learning_rate)
    warmup = training.warmup if training.warmup >= 1 else training.warmup * total_steps
    warmup = min(round(warmup), total_steps - 1)
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        training.schedule
    ]
    return highest * factor
