"""Rows of the table printed by `python -m benchmarks`."""

from __future__ import annotations

from typing import Any


def comparison(figure: str, ours: float, floor: float, mark: str, least: float = 0.0) -> dict[str, Any]:
    """Returns a row: two figures, and the ratio of the first to the second, which counts as at least `least`. `mark` is
    the target ratio."""
    below = max(floor, least)
    return {"figure": figure, "ours": ours, "floor": floor, "ratio": ours / below if below else 0.0, "mark": mark}
