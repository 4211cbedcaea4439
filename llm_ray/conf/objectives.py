"""Training objectives: what each reads from the data, and other properties that are needed before anything is loaded.

To add an objective, add an entry here, an encoder of its rows (`llm_ray.data.encode`), its loss
(`llm_ray.train.objectives`), and its `auto` values (`llm_ray.train.auto`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

PAIR_FORMATS = ("preference", "openai_preference")
"""Values of `data.format` whose rows are pairs of answers."""
ObjectiveName = Literal["sft", "pretrain", "dpo", "orpo", "kto"]
Reads = Literal["conversations", "texts", "pairs", "ratings"]


@dataclass(frozen=True)
class Objective:
    """Properties of an objective."""

    reads: Reads
    """What each row is read as."""
    taught: str
    """For the model card: the training data and what was learned from it."""
    section: str | None = None
    """Its section of `tuning`, if it has one."""

    @property
    def answers(self) -> bool:
        """Whether it trains a model to answer, so that answers before and after can be compared."""
        return self.reads != "texts"

    @property
    def compares(self) -> bool:
        """Whether it compares answers, so that there are rewards and an accuracy."""
        return self.reads in ("pairs", "ratings")


OBJECTIVES: Mapping[ObjectiveName, Objective] = MappingProxyType(
    {
        "sft": Objective(reads="conversations", taught="on conversations: the assistant's turns were supervised"),
        "pretrain": Objective(reads="texts", taught="on plain text: every token was supervised"),
        "dpo": Objective(
            reads="pairs",
            taught="on pairs of answers, to prefer the chosen one of each to the rejected one",
            section="dpo",
        ),
        "orpo": Objective(
            reads="pairs",
            taught="on pairs of answers, to give the chosen one of each and to prefer it to the rejected one",
            section="orpo",
        ),
        "kto": Objective(
            reads="ratings",
            taught="on answers rated good or bad, to make good ones likelier and bad ones less likely",
            section="kto",
        ),
    }
)

SECTIONS = tuple(f"tuning.{objective.section}." for objective in OBJECTIVES.values() if objective.section)
"""Beginnings of the keys that one objective alone has."""


def objectives_reading(reads: Reads) -> str:
    """Returns the names of the objectives that read this, for messages: "dpo or orpo"."""
    return " or ".join(name for name, objective in OBJECTIVES.items() if objective.reads == reads)
