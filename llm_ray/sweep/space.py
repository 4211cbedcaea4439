"""The searched keys in Optuna: distributions, samplers, and importance.

Optuna's choices can only be texts and numbers, those of a conf anything: they are passed as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_ray.conf.sweep import Space, SweepConf
from llm_ray.sweep.folder import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

FEWEST_FOR_IMPORTANCE = 4
"""Minimum number of trials with a metric for computing importance."""


def distributions(conf: SweepConf) -> dict[str, BaseDistribution]:
    """Returns Optuna's distribution of each searched key."""
    return {key: _distribution(space) for key, space in conf.search.items()}


def _distribution(space: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.choice is not None:
        return CategoricalDistribution([json.dumps(value) for value in space.choice])
    if space.integers:
        return IntDistribution(*space.integers)
    if space.loguniform:
        return FloatDistribution(*space.loguniform, log=True)
    assert space.uniform  # noqa: S101 (guaranteed by the schema)
    return FloatDistribution(*space.uniform)


def to_optuna(conf: SweepConf, values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a trial's values to Optuna's."""
    return {key: json.dumps(value) if conf.search[key].choice is not None else value for key, value in values.items()}


def from_optuna(conf: SweepConf, params: Mapping[str, Any]) -> dict[str, Any]:
    """Converts Optuna's values to a conf's, in the order of the conf."""
    return {
        key: json.loads(params[key]) if space.choice is not None else params[key] for key, space in conf.search.items()
    }


def sampler(conf: SweepConf, ended: int) -> BaseSampler:
    """Returns the sampler after `ended` trials. A third of all trials, 2 to 10, are random before TPE uses their
    results."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = conf.seed + ended  # a resumed sweep must not repeat proposals
    if conf.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=max(2, min(10, conf.trials // 3)), constant_liar=True)


def importance(conf: SweepConf, trials: Sequence[Trial]) -> dict[str, float]:
    """Returns each key's share of the metric's variation, in descending order, summing to 1 (PED-ANOVA, Watanabe et al.
    2023, arXiv:2304.10255, optuna.importance). Empty if there are too few trials, or all metrics are equal."""
    import optuna

    judged = [trial for trial in trials if trial.metric is not None]
    if len(judged) < FEWEST_FOR_IMPORTANCE or len({trial.metric for trial in judged}) < 2:
        return {}
    study = optuna.create_study(direction="minimize" if conf.goal == "min" else "maximize")
    spaces = distributions(conf)
    for trial in judged:
        study.add_trial(
            optuna.trial.create_trial(params=to_optuna(conf, trial.values), distributions=spaces, value=trial.metric)
        )
    found = optuna.importance.get_param_importances(study)
    return {key: float(share) for key, share in found.items()} if sum(found.values()) > 0 else {}
