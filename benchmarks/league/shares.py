"""What of this machine's limits a server reaches, and how several rounds are summed up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.league.weights import Shape


@dataclass(frozen=True)
class Middle:
    """The median of the rounds, and how far they lie apart."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Middle | None:
        """None of no values."""
        return cls(statistics.median(values), min(values), max(values), len(values)) if values else None


def decode_share(step_bytes: int, seconds_per_token: float, gb_per_s: float) -> float:
    """Of the memory bandwidth: each step reads all weights once, and gives every request under way a token."""
    return step_bytes / seconds_per_token / (gb_per_s * 1e9)


def prefill_share(of: Shape, prompt_tokens: float, seconds: float, gflops: float) -> float:
    """Of the rate of matrix products, for one prompt computed in `seconds`: two operations for each weight and token,
    and the output layer for the last token alone. Attention is left out."""
    operations = 2 * ((of.used - of.head) * prompt_tokens + of.head)
    return operations / seconds / (gflops * 1e9)
