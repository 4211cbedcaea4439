"""AdamW over the trainable weights, and the learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import as_run


def make_optimizer(module: nn.Module, conf: FinetuneConf) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    learning = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": conf.training.weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=as_run(conf.training.learning_rate),
        betas=conf.training.betas,
        eps=conf.training.eps,
        fused=True,
    )


def learning_rate(conf: FinetuneConf, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`."""
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
