"""Invariants of packing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.data.packing import WINDOW, pack


@given(lengths=st.lists(st.integers(1, 64), max_size=300), seed=st.integers(0, 3))
def test_every_sequence_once_and_none_too_long(lengths: list[int], seed: int) -> None:
    packs = list(pack(np.array(lengths, dtype=np.int64), 64, np.random.default_rng(seed)))
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in p) <= 64 for p in packs)
    # Best fit leaves at most one pack half empty.
    assert sum(sum(lengths[i] for i in p) <= 32 for p in packs) <= 1


def test_many_windows_are_filled_well() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 3 * WINDOW + 7)
    packs = list(pack(lengths, 512, np.random.default_rng(1)))
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert lengths.sum() / (512 * len(packs)) > 0.95
    # A window's packs stay together, so that the order is about that of the seed.
    assert max(packs[0]) < WINDOW


def test_same_seed_same_packs() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    one, two, other = (list(pack(lengths, 128, np.random.default_rng(s))) for s in (1, 1, 2))
    assert one == two != other
