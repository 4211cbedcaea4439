"""What a training can learn by: what each objective reads of the data, and what is known of it before anything is loaded.

A further objective is an entry here, an encoder of what it reads (`llm_ray.data.encode`), its loss
(`llm_ray.train.objectives`), and what `auto` chooses for it (`llm_ray.train.auto`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

PAIR_FORMATS = ("preference", "openai_preference")
"""Those of `data.format` whose rows are pairs of answers."""
ObjectiveName = Literal["sft", "pretrain", "dpo", "orpo"]
Reads = Literal["conversations", "texts", "pairs"]


@dataclass(frozen=True)
class Objective:
    """What is to be known of an objective without its code."""

    reads: Reads
    """What it makes of a row, and learns from."""
    taught: str
    """For the model card: what it was shown, and what of that was learnt."""
    section: str | None = None
    """The section of `tuning` that sets it, if it has one."""

    @property
    def answers(self) -> bool:
        """Whether it teaches to answer, so that the model can be asked questions before and after."""
        return self.reads != "texts"


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
    }
)


def objectives_reading(reads: Reads) -> str:
    """Those that learn from it, by name, for people: "dpo or orpo"."""
    return " or ".join(name for name, objective in OBJECTIVES.items() if objective.reads == reads)
