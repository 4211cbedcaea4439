"""Training objectives: the loss of a batch, what it is averaged over, and the metrics reported with it.

An objective returns sums over a batch. The training function adds them up over all passes of a step and all workers, and
divides by the total weight, so neither losses nor gradients depend on how a step's rows are distributed. What an
objective reads from the data is defined in `llm_ray.conf.objectives`, its encoding as tokens in `llm_ray.data.encode`.
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

from llm_ray.conf.finetune import Dpo, FinetuneConf, Kto, Orpo, Tuning
from llm_ray.train.batches import Batch

if TYPE_CHECKING:
    from llm_ray.train.loss import SupervisedLoss


class Objective(Protocol):
    """An objective: its loss and the figures reported with it."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the values of `sums`: first "loss", whose gradient is used."""
        ...

    @property
    def likelihood(self) -> bool:
        """Whether the loss is a mean negative log-likelihood of tokens, so that its exponential is a perplexity."""
        ...

    @property
    def reference(self) -> bool:
        """Whether the loss compares with the base model, whose log-probabilities batches must then contain."""
        ...

    def sums(self, module: SupervisedLoss, batch: Batch) -> Tensor:
        """Returns each figure summed over the batch: fp32 [figures]. For a batch without rows these are zeros, still
        attached to the model's graph."""
        ...

    def weight(self, batch: Batch) -> int:
        """Returns the batch's number of items that figures are averaged over, such as supervised tokens or pairs."""
        ...

    def means(self, sums: list[float], weight: float) -> dict[str, float]:
        """Returns what is reported, by name: "loss" and others, from the sums and weights of all batches of a step. By
        default `sums` divided by `weight` (zeros if nothing was summed)."""
        return {name: value / max(1.0, weight) for name, value in zip(self.figures, sums, strict=True)}


@dataclass(frozen=True)
class CrossEntropy(Objective):
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


class Preference(Objective, ABC):
    """A loss over preference pairs; figures are means over pairs."""

    figures: tuple[str, ...]
    likelihood = False
    reference: bool

    def sums(self, module: SupervisedLoss, batch: Batch) -> Tensor:
        pairs = batch.pairs
        if pairs is None:
            raise ValueError("a preference loss needs a batch of pairs")
        given = module.log_probabilities(batch).view(-1, 2)[: len(pairs.tokens)]
        return self.figures_of(given, pairs.reference, pairs.tokens)

    def weight(self, batch: Batch) -> int:
        return 0 if batch.pairs is None else len(batch.pairs.tokens)

    @abstractmethod
    def figures_of(self, given: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """Returns the figures, summed over pairs: fp32 [figures].

        given, reference: fp32 [pairs, 2], log-probabilities (nats) of chosen and rejected answers under the model and
        under its base; tokens: int64 [pairs, 2], their numbers of tokens. Only the loss carries gradients.
        """


@dataclass(frozen=True)
class DirectPreference(Preference):
    """The losses of direct preference optimization (sources: `llm_ray.conf.finetune.Dpo`)."""

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
    """The loss of odds ratio preference optimization (arXiv:2403.07691, eq. 6): the chosen answer's mean negative
    log-likelihood per token, minus beta times the log-sigmoid of the log odds ratio. An answer's probability is the
    geometric mean over its tokens."""

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


@dataclass(frozen=True)
class KahnemanTversky(Objective):
    """The losses of Kahneman-Tversky optimization (sources: `llm_ray.conf.finetune.Kto`), as in TRL's KTOTrainer. Rewards
    and log-probabilities are means over the answers rated good (chosen) or bad (rejected), the rest over all."""

    kto: Kto
    figures: tuple[str, ...] = (
        *("loss", "kl", "rewards/accuracies"),
        *("rewards/chosen", "rewards/rejected", *_LOG_PROBABILITIES, "good"),
    )
    likelihood: bool = False
    reference: bool = True

    def sums(self, module: SupervisedLoss, batch: Batch) -> Tensor:
        ratings = batch.ratings
        if ratings is None:
            raise ValueError("the loss of kto needs a batch of rated answers")
        given = module.log_probabilities(batch)[: len(ratings.good)]
        return self.figures_of(given, ratings.reference, ratings.good, ratings.divergence)

    def figures_of(self, given: Tensor, reference: Tensor, good: Tensor, divergence: float) -> Tensor:
        """Returns the figures, summed over answers: fp32 [figures].

        given, reference: fp32 [answers], log-probabilities (nats) under the model and under its base; good: bool
        [answers]; divergence: see :func:`divergence_of`. Only the loss carries gradients.
        """
        ratios = given - reference
        agreement = (ratios - divergence) * torch.where(good, 1.0, -1.0)  # above zero: on the side of the rating
        weights = torch.where(good, self.kto.desirable_weight, self.kto.undesirable_weight)
        losses = weights * (1 - torch.sigmoid(self.kto.beta * agreement))
        rewards = self.kto.beta * ratios
        reported = [torch.full_like(given, divergence), (agreement > 0).float()]
        for values in (rewards, given):
            reported += [values[good], values[~good]]
        return _summed(losses, [*reported, good.float()])

    def weight(self, batch: Batch) -> int:
        return 0 if batch.ratings is None else len(batch.ratings.good)

    def means(self, sums: list[float], weight: float) -> dict[str, float]:
        """As in the protocol; without figures of good or bad answers if there are none, and the divergence if it is not
        estimated."""
        *values, good = sums
        over = [max(1.0, weight)] * 3 + [good, weight - good] * 2
        means = {name: value / n for name, value, n in zip(self.figures, values, over, strict=False) if n}
        if self.kto.loss != "kto":
            del means["kl"]
        if 0 < good < weight:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


def divergence_of(ratios: float, rows: float) -> float:
    """Returns the estimated divergence of the model from its base in nats, at least 0: `ratios` is the sum, over `rows`
    rows with a prompt and the answer to another one, of log-probability minus that under the base model
    (arXiv:2402.01306, section 4.1)."""
    return max(0.0, ratios / max(1.0, rows))


def _log_of_one_minus_exp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate near both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))").
    Values above -1e-7 are clamped to it, without a gradient: the odds of a certain answer are infinite."""
    values = values.clamp(max=-1e-7)
    small = values < -math.log(2)  # where a branch is not used, it gets a harmless value to keep its gradient finite
    far = torch.log1p(-torch.exp(torch.where(small, values, -1.0)))
    return torch.where(small, far, torch.log(-torch.expm1(torch.where(small, -0.1, values))))


def _rewards(rewards: Tensor) -> list[Tensor]:
    """The reported rewards: of chosen and rejected answers, their difference, and whether it is positive."""
    return [*rewards.unbind(1), rewards[:, 0] - rewards[:, 1], (rewards[:, 0] > rewards[:, 1]).float()]


def _summed(losses: Tensor, *reported: Sequence[Tensor]) -> Tensor:
    figures = [figure.detach().sum() for figures in reported for figure in figures]
    return torch.stack([losses.sum(), *figures])


def preference_of(tuning: Tuning) -> Preference:
    """Returns the loss of an objective on pairs."""
    return OddsRatio(tuning.orpo) if tuning.objective == "orpo" else DirectPreference(tuning.dpo)


def objective_of(conf: FinetuneConf) -> Objective:
    """Returns the objective of the training of `conf`."""
    if conf.objective.reads == "ratings":
        return KahnemanTversky(conf.tuning.kto)
    return preference_of(conf.tuning) if conf.objective.reads == "pairs" else CrossEntropy()
