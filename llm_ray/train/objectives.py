"""What a training learns by: the loss of a batch, what it is a mean over, and the figures that are told beside it.

An objective gives sums over a batch. The training function adds them up over all passes of a step and all workers, and
divides by the weight of all: so neither losses nor gradients depend on how a step's rows were dealt out. What an
objective reads of the data is in `llm_ray.conf.objectives`, how that becomes tokens in `llm_ray.data.encode`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_ray.conf.finetune import Dpo, FinetuneConf, Orpo, Tuning
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

    @property
    def reference(self) -> bool:
        """Whether it is measured against the base model, whose log-probabilities batches then hold."""
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
    reference: bool = False

    def sums(self, module: SupervisedLoss, batch: Batch) -> Tensor:
        return module.cross_entropy(batch)[None]

    def weight(self, batch: Batch) -> int:
        return len(batch.targets)


_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
_LOG_PROBABILITIES = ("logps/chosen", "logps/rejected")


class Preference(ABC):
    """A loss of preference pairs; figures are means over pairs."""

    figures: tuple[str, ...]
    likelihood = False
    reference: bool

    def sums(self, module: SupervisedLoss, batch: Batch) -> Tensor:
        pairs = batch.pairs
        if pairs is None:
            raise ValueError("preferences are learnt from pairs")
        given = module.log_probabilities(batch).view(-1, 2)[: len(pairs.tokens)]
        return self.figures_of(given, pairs.reference, pairs.tokens)

    def weight(self, batch: Batch) -> int:
        return 0 if batch.pairs is None else len(batch.pairs.tokens)

    @abstractmethod
    def figures_of(self, given: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """The figures, summed over pairs: fp32 [figures].

        given, reference: fp32 [pairs, 2], log-probabilities (nats) of chosen and rejected answers under the model and
        under its base; tokens: int64 [pairs, 2], theirs. Gradients flow through the loss alone.
        """


@dataclass(frozen=True)
class DirectPreference(Preference):
    """The losses of direct preference optimization."""

    dpo: Dpo
    figures: tuple[str, ...] = ("loss", *_REWARDS, *_LOG_PROBABILITIES)
    reference: bool = True

    def figures_of(self, given: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        beta, smoothing = self.dpo.beta, self.dpo.label_smoothing
        ratios = given - reference
        margin = ratios[:, 0] - ratios[:, 1]
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        if self.dpo.loss == "sigmoid":
            losses = -(1 - smoothing) * right - smoothing * wrong
        elif self.dpo.loss == "robust":
            losses = (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)
        elif self.dpo.loss == "ipo":
            means_of_tokens = ratios / tokens.clamp(min=1)
            losses = (means_of_tokens[:, 0] - means_of_tokens[:, 1] - 1 / (2 * beta)) ** 2
        else:
            losses = F.relu(1 - beta * margin)
        if self.dpo.sft_weight:
            losses = losses - self.dpo.sft_weight * given[:, 0] / tokens[:, 0].clamp(min=1)
        return _summed(losses, _rewards(beta * ratios), given.unbind(1))


@dataclass(frozen=True)
class OddsRatio(Preference):
    """The loss of odds ratio preference optimization (arXiv:2403.07691, eq. 6): the negative log-likelihood of the chosen
    answer, a mean over its tokens, and the log-sigmoid of the odds ratio, of probabilities that are geometric means over
    tokens."""

    orpo: Orpo
    figures: tuple[str, ...] = ("loss", "nll_loss", "log_odds_ratio", *_REWARDS, *_LOG_PROBABILITIES)
    reference: bool = False

    def figures_of(self, given: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        means_of_tokens = given / tokens.clamp(min=1)
        log_odds = means_of_tokens - _log_of_one_minus_exp(means_of_tokens)
        ratio = log_odds[:, 0] - log_odds[:, 1]
        likelihood = -means_of_tokens[:, 0]
        losses = likelihood - self.orpo.beta * F.logsigmoid(ratio)
        rewards = _rewards(self.orpo.beta * means_of_tokens)
        return _summed(losses, [likelihood, ratio], rewards, means_of_tokens.unbind(1))


def _log_of_one_minus_exp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))"). An x so
    near 0 that nothing is left counts as 1e-7 below it, without a gradient: the odds of a certain answer have no end."""
    values = values.clamp(max=-1e-7)
    small = values < -math.log(2)  # each branch gets harmless values where the other one counts, for its gradient
    far = torch.log1p(-torch.exp(torch.where(small, values, -1.0)))
    return torch.where(small, far, torch.log(-torch.expm1(torch.where(small, -0.1, values))))


def _rewards(rewards: Tensor) -> list[Tensor]:
    """As told: of chosen and rejected answers, their difference, and whether it is above 0."""
    return [*rewards.unbind(1), rewards[:, 0] - rewards[:, 1], (rewards[:, 0] > rewards[:, 1]).float()]


def _summed(losses: Tensor, *told: Sequence[Tensor]) -> Tensor:
    figures = [figure.detach().sum() for figures in told for figure in figures]
    return torch.stack([losses.sum(), *figures])


def preference_of(tuning: Tuning) -> Preference:
    """The loss of an objective that learns from pairs."""
    return OddsRatio(tuning.orpo) if tuning.objective == "orpo" else DirectPreference(tuning.dpo)


def objective_of(conf: FinetuneConf) -> Objective:
    """What the training of `conf` learns by."""
    return preference_of(conf.tuning) if conf.objective.reads == "pairs" else CrossEntropy()


def means(objective: Objective, sums: list[float], weight: float) -> dict[str, float]:
    """The objective's figures, by name, of sums over what weighs `weight` (nothing: zeros)."""
    return {name: value / max(1.0, weight) for name, value in zip(objective.figures, sums, strict=True)}
