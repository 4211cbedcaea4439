"""Shares of this machine's limits that a server reaches, and the summary of several rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.league.weights import Shape


@dataclass(frozen=True)
class Median:
    """The median over rounds, with minimum and maximum."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Median | None:
        """Returns the summary, or None if there are no values."""
        return cls(statistics.median(values), min(values), max(values), len(values)) if values else None


def decode_share(step_bytes: int, seconds_per_token: float, gb_per_s: float) -> float:
    """Returns the share of the memory bandwidth: each step reads all weights once, and computes a token for every
    running request."""
    return step_bytes / seconds_per_token / (gb_per_s * 1e9)


def prefill_share(of: Shape, prompt_tokens: float, seconds: float, gflops: float) -> float:
    """Returns the share of the matrix product rate, for one prompt computed in `seconds`: two operations per weight and
    token, but only the last token for the output layer. Attention is not counted."""
    operations = 2 * ((of.used - of.head) * prompt_tokens + of.head)
    return operations / seconds / (gflops * 1e9)
