"""Sequences put together into packs of at most `max_length` tokens, by best-fit decreasing (Johnson 1973).

Only lengths are handled here: a pack is the list of its sequences' numbers. The sequences of a window are packed at a
time, which keeps the order about as it was shuffled; packs inside a window are shuffled again, for best fit puts the
long sequences first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

WINDOW = 4096


def pack(lengths: np.ndarray, max_length: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Numbers of the sequences of each pack, every sequence once.

    `lengths` int array [sequences], each from 1 to `max_length`; `rng` shuffles packs within a window.
    """
    for start in range(0, len(lengths), WINDOW):
        packs: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens free, number of the pack), sorted
        window = lengths[start : start + WINDOW]
        for number in (-window).argsort(kind="stable").tolist():
            length = int(window[number])
            place = bisect_left(room, (length, -1))
            if place < len(room):
                free, which = room.pop(place)
            else:
                free, which = max_length, len(packs)
                packs.append([])
            packs[which].append(start + number)
            if free > length:
                insort(room, (free - length, which))
        for which in rng.permutation(len(packs)):
            yield packs[which]
