"""The rows of each worker, and their layout in tensors."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.data.encode import IGNORED
from llm_ray.train.batches import Schedule, collate, passes_over

DATA = datasets.Dataset.from_dict(
    {
        "input_ids": [[1, 2, 3], [4, 5], [6, 7, 8]],
        "labels": [[IGNORED, 2, 3], [IGNORED, 5], [IGNORED, IGNORED, 8]],
    }
)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=50)


def schedule_of(
    lengths: list[int], batch_size: int = 8, limit: int = 100, packed: bool = True, seed: int = 0
) -> Schedule:
    return Schedule(np.array(lengths), batch_size, limit, packed, seed)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.booleans(), st.integers(0, 5))
def test_an_epoch_takes_every_row_once(
    lengths: list[int], batch_size: int, workers: int, packed: bool, seed: int
) -> None:
    schedule = schedule_of(lengths, batch_size, packed=packed, seed=seed)
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        taken = [
            i
            for step in steps
            for rank in range(workers)
            for pass_ in schedule.indices(step, rank, workers)
            for i in pass_
        ]
        assert sorted(taken) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.integers(20, 200), st.booleans())
def test_packing_limits_and_workers_change_passes_and_not_what_a_step_learns_from(
    lengths: list[int], batch_size: int, workers: int, limit: int, packed: bool
) -> None:
    one = schedule_of(lengths, batch_size, limit=10**6)
    other = schedule_of(lengths, batch_size, limit=limit, packed=packed)
    assert one.steps_per_epoch == other.steps_per_epoch
    for step in range(one.steps_per_epoch):
        (rows,) = one.indices(step, 0, 1)
        assert len(rows) <= batch_size
        passes = [other.indices(step, rank, workers) for rank in range(workers)]
        assert sorted(i for mine in passes for pass_ in mine for i in pass_) == sorted(rows)
        assert len({len(mine) for mine in passes}) == 1, "every worker takes part in every pass"
        for pass_ in (pass_ for mine in passes for pass_ in mine if len(pass_) > 1):
            tokens = [lengths[i] for i in pass_]
            assert (sum(tokens) if packed else max(tokens) * len(tokens)) <= limit


def test_rows_that_fit_share_a_pass_and_workers_have_about_as_many_tokens() -> None:
    schedule = schedule_of([50, 40, 10, 50, 45, 5], batch_size=6)
    passes = [schedule.indices(0, rank, 2) for rank in range(2)]
    assert [len(mine) for mine in passes] == [1, 1]
    assert [sum(int(schedule.lengths[i]) for i in mine[0]) for mine in passes] == [100, 100]


def test_epochs_differ_in_order_and_seeds_too() -> None:
    def order(step: int, seed: int) -> list[int]:
        return schedule_of([1] * 20, batch_size=20, seed=seed).indices(step, 0, 1)[0]

    assert order(0, seed=0) != order(1, seed=0)
    assert order(0, seed=0) != order(0, seed=1)


@given(LENGTHS, st.integers(1, 200), st.integers(1, 4))
def test_a_pass_over_all_rows_takes_as_many_batches_on_each_worker(
    lengths: list[int], limit: int, workers: int
) -> None:
    parts = [passes_over(np.array(lengths, dtype=int), limit, rank, workers) for rank in range(workers)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(len(lengths)))
    assert len({len(part) for part in parts}) == 1


def test_packed_rows_lie_end_to_end_and_predict_only_within_themselves() -> None:
    batch = collate(DATA, [0, 1, 2], packed=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.row_lengths == [3, 2, 3]
    assert batch.supervised.tolist() == [0, 1, 3, 6]
    assert batch.targets.tolist() == [2, 3, 5, 8]
    assert batch.tokens == 8


def test_padded_rows_have_the_same_targets() -> None:
    batch = collate(DATA, [0, 1, 2], packed=False)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert batch.targets.tolist() == [2, 3, 5, 8]
    assert batch.tokens == 8


@pytest.mark.parametrize("packed", [True, False])
def test_without_sequences_there_is_something_to_compute_but_nothing_to_learn(packed: bool) -> None:
    batch = collate(DATA, [], packed)
    assert batch.input_ids.numel() > 0
    assert batch.targets.tolist() == []
    assert batch.tokens == 0
