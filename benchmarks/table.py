"""The lines of the table that `python -m benchmarks` prints."""

from __future__ import annotations

from typing import Any


def comparison(figure: str, ours: float, floor: float, mark: str, least: float = 0.0) -> dict[str, Any]:
    """A line: two figures, and the first as a multiple of the second, which counts as at least `least`. `mark` is what
    the multiple should be."""
    below = max(floor, least)
    return {"figure": figure, "ours": ours, "floor": floor, "ratio": ours / below if below else 0.0, "mark": mark}
