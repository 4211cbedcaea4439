"""What tests of losses that compare answers share: a tiny model, a step without Ray, and how a model learns by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_ray.train.attention import use_packed_attention
from llm_ray.train.batches import Mismatches
from llm_ray.train.loss import SupervisedLoss
from llm_ray.train.objectives import Objective
from llm_ray.train.recipe import Setup
from llm_ray.train.reference import reference_log_probabilities


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()


def setup_of(causal: LlamaForCausalLM, objective: Objective, *, packed: bool, blockwise: bool) -> Setup:
    if packed:
        assert use_packed_attention(causal)
    module = SupervisedLoss(causal, causal, packed, objective)
    module.blockwise = blockwise
    return Setup(module, objective, torch.optim.SGD(module.parameters()), contextlib.nullcontext, packed, "fp32", [])


def reference_of(
    module: nn.Module, data: datasets.Dataset, folder: Path, mismatches: Mismatches | None = None
) -> Tensor | None:
    """The reference of one worker, kept in the folder `kept` and ended by the file `.stop` there."""
    return reference_log_probabilities(
        module,
        data,
        folder / "kept",
        packed=False,
        limit=64,
        rank=0,
        workers=1,
        autocast=contextlib.nullcontext,
        stop=folder / ".stop",
        mismatches=mismatches,
    )


def learned(module: SupervisedLoss, step: Callable[[Setup], dict[str, float]]) -> list[dict[str, float]]:
    """The figures of thirty steps, after each of which the weights that are trained are updated; each of them changes."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    setup = Setup(module.eval(), module.objective, optimizer, contextlib.nullcontext, False, "fp32", [])
    figures = []
    for _ in range(30):
        figures.append(step(setup))
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(before[name], p) for name, p in trained.items())
    return figures
