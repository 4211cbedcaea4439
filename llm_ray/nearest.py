"""Suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.6
"""The likeness from which on a name is suggested, as difflib counts it: 1 is the same."""


def nearest_names(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Those of the known names that are most like `name`, at most so many, the likeliest first; upper and lower case
    are the same."""
    by_lower: dict[str, str] = {}
    for one in known:
        by_lower.setdefault(one.lower(), one)
    return [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, most, CUTOFF)]
