"""The schema of a sweep's conf: a finetune, the keys to search, and limits.

As in ``llm_ray.conf.finetune``, the text under each field is its documentation. ``llm_ray.conf.load`` checks the
searched keys against the finetune's schema, since it knows where files are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llm_ray.conf.section import Section

Setting = bool | int | float | str | list[Any] | dict[str, Any] | None


class Space(Section):
    """The values that trials choose from for one key: exactly one of these."""

    choice: tuple[Any, ...] | None = None
    """One of these values, of any type that the key accepts: `[8, 16, 32]`, `[cosine, constant]`."""
    uniform: tuple[float, float] | None = None
    """A number between two others, sampled on a linear scale: `[0, 0.2]`."""
    loguniform: tuple[float, float] | None = None
    """A number between two positive ones, sampled on a logarithmic scale, as for learning rates: `[1e-4, 1e-2]`."""
    integers: tuple[int, int] | None = None
    """An integer between two others, both included: `[1, 6]`."""

    @model_validator(mode="after")
    def _one(self) -> Space:
        kinds = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(kinds) != 1:
            given = " and ".join(kinds) if kinds else "nothing"
            raise ValueError(f"has {given}: give exactly one of {', '.join(type(self).model_fields)}")
        if self.choice is not None:
            if len(self.choice) < 2:
                raise ValueError(
                    f"choice has {len(self.choice)} value{'s' * (len(self.choice) != 1)}: give two or more, or set the key "
                    "below set:"
                )
            if len({json.dumps(value) for value in self.choice}) < len(self.choice):
                raise ValueError("choice has a value twice: keep one")
        else:
            low, high = getattr(self, kinds[0])
            if low >= high:
                raise ValueError(f"{kinds[0]} [{low:g}, {high:g}] is empty: the first number must be below the second")
            if self.loguniform and low <= 0:
                raise ValueError(f"loguniform begins at {low:g}: it must be above 0")
        return self

    @property
    def values(self) -> list[Any] | None:
        """All values, or None if the space is continuous."""
        if self.choice is not None:
            return list(self.choice)
        return list(range(self.integers[0], self.integers[1] + 1)) if self.integers else None

    @property
    def ends(self) -> list[Any]:
        """The values to validate: every choice, or both ends of a range."""
        return list(self.choice or self.integers or self.uniform or self.loguniform or ())


class Asha(Section):
    """Early stopping of bad trials by ASHA (Li et al. 2020, arXiv:1810.05934): after the share `grace` of its training,
    and at every multiple of that by `reduction`, a trial continues only if it is among the best 1 / `reduction` of the
    trials that have come as far."""

    enabled: bool = True
    """Whether to stop bad trials."""
    grace: float = Field(0.25, gt=0, lt=1)
    """Share of its training that every trial completes."""
    reduction: float = Field(3, gt=1)
    """One in this many trials continues."""


class SweepConf(Section):
    """A search for the best values of some keys of a finetune. Each trial is a finetune of its own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the sweep, and of the run that the best trial becomes: its folder under the finetune's `paths.runs`, with
    the sweep in the subfolder `sweep`. Letters, digits, `.`, `_`, `-`; at most 63."""
    config: str = Field(min_length=1)
    """The finetune's conf, as for `llm-ray finetune --config`: a file, beside this one or in the current folder, or the
    name of a shipped template."""
    set: dict[str, Setting] = Field(default_factory=dict)
    """Variables of its template and (dotted) keys that are the same for all trials, as for `llm-ray finetune --set`."""
    search: dict[str, Space] = Field(min_length=1)
    """The keys to search, dotted, from the finetune's sections `tuning` and `training`, and their values. Keys that
    change the data or the meaning of the loss are rejected: all trials train on the same tokens, so their losses are
    comparable."""
    metric: Literal["loss", "accuracy"] = "loss"
    """What to optimize on the validation rows: low `loss`; or, for objectives that learn from pairs or rated answers,
    high `accuracy` (the share of pairs whose chosen answer is preferred, or of answers whose reward agrees with their
    rating), which also allows searching keys that change the meaning of the loss (`tuning.dpo.beta`)."""
    test: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training rows that trials neither train on nor are selected by (the finetune's `data.test`, which
    takes precedence): the best trial is evaluated on them, in comparison with the base model."""
    trials: int = Field(12, ge=1)
    """Maximum number of trials. If there are no more combinations than that, all of them are tried."""
    hours: float | None = Field(None, gt=0)
    """Maximum hours in which trials run, over all starts of the command. Trials still running then are stopped with a
    checkpoint; completed ones are compared. Unset: no limit."""
    concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Concurrent trials, each on its own cores. `auto`: as many as the finetune's `runtime.cpus_per_worker` leaves room
    for; if that is `auto` as well, up to 4, which share the cores."""
    cpus: int | None = Field(None, ge=1)
    """Maximum CPUs (cores) for all trials together. Unset: all of the machine, or of the cluster."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How values are proposed: `tpe` (Optuna's tree-structured Parzen estimator) near those of good trials, after some
    random ones; `random` always at random."""
    validations: int = Field(5, ge=1)
    """Number of validations during a trial's training, at each of which it may be stopped; applies if the finetune's
    conf leaves `training.validate_every` unset."""
    asha: Asha = Asha()
    seed: int = Field(42, ge=0)
    """Seed of the proposals. Trials use the finetune's `training.seed`."""

    @property
    def goal(self) -> Literal["min", "max"]:
        """Whether to minimize or maximize the metric."""
        return "min" if self.metric == "loss" else "max"

    @property
    def combinations(self) -> int | None:
        """Number of combinations of values; None if a space is continuous."""
        total = 1
        for space in self.search.values():
            values = space.values
            if values is None:
                return None
            total *= len(values)
        return total

    def grid(self) -> list[dict[str, Any]]:
        """Returns all combinations of values; all spaces must be finite."""
        return [
            dict(zip(self.search, values, strict=True))
            for values in itertools.product(*(space.values or () for space in self.search.values()))
        ]


def with_values(values: Mapping[str, Any], conf: dict[str, Any]) -> dict[str, Any]:
    """Returns a finetune's conf, as plain values, with some dotted keys replaced."""
    made = dict(conf)
    for name, value in values.items():
        node = made
        *sections, leaf = name.split(".")
        for section in sections:
            node[section] = dict(node[section])
            node = node[section]
        node[leaf] = value
    return made
