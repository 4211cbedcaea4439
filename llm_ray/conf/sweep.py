"""The schema of a sweep's conf: a finetune, the keys of it to search, and limits.

As in ``llm_ray.conf.finetune``, the text under each field is its documentation. What concerns the finetune's own schema
(whether a searched key is one of it, and takes every value of its space) is checked in ``llm_ray.conf.load``, which
knows where files lie.
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
    """The values of one key that trials take: exactly one of these."""

    choice: tuple[Any, ...] | None = None
    """One of these values, of any kind that the key takes: `[8, 16, 32]`, `[cosine, constant]`."""
    uniform: tuple[float, float] | None = None
    """A number between two others, each as likely: `[0, 0.2]`."""
    loguniform: tuple[float, float] | None = None
    """A number between two others above 0, each order of magnitude as likely, as for learning rates: `[1e-4, 1e-2]`."""
    integers: tuple[int, int] | None = None
    """A whole number from the first to the second, both included: `[1, 6]`."""

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
        """All values, where they can be counted."""
        if self.choice is not None:
            return list(self.choice)
        return list(range(self.integers[0], self.integers[1] + 1)) if self.integers else None

    @property
    def ends(self) -> list[Any]:
        """The values that decide whether a key takes all of them: every choice, or both ends."""
        return list(self.choice or self.integers or self.uniform or self.loguniform or ())


class Asha(Section):
    """Stopping bad trials early, by ASHA (Li et al. 2020, arXiv:1810.05934): at `grace` of its training, and again at every
    multiple by `reduction`, a trial goes on only if it is among the best 1 / `reduction` of those that came so far."""

    enabled: bool = True
    """Whether bad trials are stopped."""
    grace: float = Field(0.25, gt=0, lt=1)
    """Share of its training that every trial gets."""
    reduction: float = Field(3, gt=1)
    """One trial in so many goes on."""


class SweepConf(Section):
    """A search for the best values of some keys of a finetune, by trials, each a finetune of its own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the sweep, and of the run that the best trial becomes: its folder under `paths.runs` of the finetune. The
    sweep is in the folder `sweep` within. Letters, digits, `.`, `_`, `-`; at most 63."""
    config: str = Field(min_length=1)
    """The finetune's conf: a file, beside this one or in the current folder, or the name of a shipped template, as after
    `llm-ray finetune --config`."""
    set: dict[str, Setting] = Field(default_factory=dict)
    """Variables of its template, and keys of it (dotted), that all trials have, as after `llm-ray finetune --set`."""
    search: dict[str, Space] = Field(min_length=1)
    """The keys to search, dotted, of the finetune's sections `tuning` and `training`, and the values of each. All trials
    train on the same tokens, so that their losses can be compared: keys that change the data or what the loss means are
    refused."""
    metric: Literal["loss", "accuracy"] = "loss"
    """What makes a trial good, on the validation rows: a low `loss`; or, where the objective learns from pairs, a high
    `accuracy` (the share of pairs whose chosen answer is preferred), with which keys that change what the loss means
    (`tuning.dpo.beta` of a finetune) can be searched, too."""
    test: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training rows that no trial trains on or is chosen by (`data.test` of the finetune, which holds if it
    is given there): the best trial's figures are told on them, beside the base model's."""
    trials: int = Field(12, ge=1)
    """Most trials. A space with no more combinations than that is tried in full."""
    hours: float | None = Field(None, gt=0)
    """Most hours that trials run, all starts of the command together. Trials that run then are stopped with a
    checkpoint; those that ended are judged. Unset: no limit."""
    concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at once, each on cores of its own. `auto`: as many as there is room for with `runtime.cpus_per_worker` of the
    finetune; if that is `auto` as well, up to 4, which share the cores."""
    cpus: int | None = Field(None, ge=1)
    """Most CPUs (cores) that all trials use together. Unset: all of the machine, or of the cluster."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How values are proposed: `tpe` (Optuna's tree-structured Parzen estimator) near those of good trials, after some at
    random; `random` always at random."""
    validations: int = Field(5, ge=1)
    """How often a trial is validated, and may be stopped, in the course of its training, where the finetune's conf leaves
    `training.validate_every` unset."""
    asha: Asha = Asha()
    seed: int = Field(42, ge=0)
    """Seed of the proposals. Trials themselves have `training.seed` of the finetune."""

    @property
    def goal(self) -> Literal["min", "max"]:
        """Whether a low or a high metric is good."""
        return "min" if self.metric == "loss" else "max"

    @property
    def combinations(self) -> int | None:
        """How many trials could differ; None where a key has more values than can be counted."""
        total = 1
        for space in self.search.values():
            values = space.values
            if values is None:
                return None
            total *= len(values)
        return total

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, of a space in which they can be counted."""
        return [
            dict(zip(self.search, values, strict=True))
            for values in itertools.product(*(space.values or () for space in self.search.values()))
        ]


def with_values(values: Mapping[str, Any], conf: dict[str, Any]) -> dict[str, Any]:
    """A finetune's conf, as plain values, with those of some dotted keys."""
    made = dict(conf)
    for name, value in values.items():
        node = made
        *sections, leaf = name.split(".")
        for section in sections:
            node[section] = dict(node[section])
            node = node[section]
        node[leaf] = value
    return made
