"""What a training learns by: the loss of a batch, what it is a mean over, and the figures that are told beside it.

An objective gives sums over a batch. The training function adds them up over all passes of a step and all workers, and
divides by the weight of all: so neither losses nor gradients depend on how a step's rows were dealt out. What an
objective reads of the data is in `llm_ray.conf.objectives`, how that becomes tokens in `llm_ray.data.encode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.objectives import ObjectiveName
from llm_ray.train.batches import Batch

if TYPE_CHECKING:
    from llm_ray.train.loss import SupervisedLoss


class Objective(Protocol):
    """The loss of an objective."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what `sums` gives: "loss" first, of which the gradient is taken."""
        ...

    @property
    def likelihood(self) -> bool:
        """Whether the loss is a mean negative log-likelihood of tokens, so that its exponential is a perplexity."""
        ...

    def sums(self, module: SupervisedLoss, batch: Batch) -> Tensor:
        """Each figure summed over the batch: fp32 [figures]. Of a batch without rows: zeros that hang on the model."""
        ...

    def weight(self, batch: Batch) -> int:
        """What the sums are divided by for means: how many of what is averaged over the batch holds."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-likelihood of supervised tokens, in nats."""

    figures: tuple[str, ...] = ("loss",)
    likelihood: bool = True

    def sums(self, module: SupervisedLoss, batch: Batch) -> Tensor:
        return module.cross_entropy(batch)[None]

    def weight(self, batch: Batch) -> int:
        return len(batch.targets)


OBJECTIVES: Mapping[ObjectiveName, Objective] = MappingProxyType({"sft": CrossEntropy(), "pretrain": CrossEntropy()})


def objective_of(conf: FinetuneConf) -> Objective:
    """What the training of `conf` learns by."""
    return OBJECTIVES[conf.tuning.objective]


def means(objective: Objective, sums: list[float], weight: float) -> dict[str, float]:
    """The objective's figures, by name, of sums over what weighs `weight` (nothing: zeros)."""
    return {name: value / max(1.0, weight) for name, value in zip(objective.figures, sums, strict=True)}
