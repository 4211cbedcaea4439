"""Suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.6
"""Minimum similarity of a suggestion, as computed by difflib; 1 means equal."""


def nearest_names(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Returns at most `most` known names similar to `name`, the most similar first; case is ignored."""
    by_lower: dict[str, str] = {}
    for one in known:
        by_lower.setdefault(one.lower(), one)
    return [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, most, CUTOFF)]
