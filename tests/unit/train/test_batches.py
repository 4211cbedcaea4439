"""Which sequences a worker takes, and how they lie in tensors."""

from __future__ import annotations

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.train.batches import IGNORE, Schedule, collate, shares

DATA = datasets.Dataset.from_dict(
    {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 8]],
        "labels": [[IGNORE, 2, 3, IGNORE, 5], [IGNORE, IGNORE, 8]],
        "lengths": [[3, 2], [3]],
    }
)


@given(st.integers(1, 50), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_an_epoch_takes_every_sequence_once(sequences: int, batch_size: int, accumulation: int, workers: int, seed: int) -> None:
    schedule = Schedule(sequences, batch_size, accumulation, workers, seed)
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        taken = [i for step in steps for rank in range(workers) for pass_ in schedule.take(step, rank) for i in pass_]
        assert sorted(taken) == list(range(sequences))
        assert all(len(schedule.take(step, rank)) == accumulation for step in steps for rank in range(workers))


def test_a_step_takes_the_same_sequences_whatever_the_number_of_workers() -> None:
    def taken(workers: int, batch_size: int) -> list[set[int]]:
        schedule = Schedule(37, batch_size, 2, workers, seed=1)
        return [{i for rank in range(workers) for p in schedule.take(step, rank) for i in p} for step in range(schedule.steps_per_epoch)]

    assert taken(workers=1, batch_size=4) == taken(workers=2, batch_size=2) == taken(workers=4, batch_size=1)


@given(st.integers(1, 50), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.data())
def test_with_workers_lost_a_step_takes_the_same_sequences_in_more_passes(
    sequences: int, batch_size: int, accumulation: int, workers: int, data: st.DataObject
) -> None:
    present = data.draw(st.integers(1, workers))
    whole, fewer = (Schedule(sequences, batch_size, accumulation, workers, 3, present) for present in (None, present))
    assert fewer.steps_per_epoch == whole.steps_per_epoch
    for step in range(whole.steps_per_epoch):
        passes = [fewer.take(step, rank) for rank in range(present)]
        assert len({len(mine) for mine in passes}) == 1
        assert all(len(pass_) <= batch_size for mine in passes for pass_ in mine)
        taken = sorted(i for mine in passes for pass_ in mine for i in pass_)
        assert taken == sorted(i for rank in range(workers) for pass_ in whole.take(step, rank) for i in pass_)


def test_epochs_differ_in_order_and_seeds_too() -> None:
    schedule = Schedule(20, 20, 1, 1, seed=0)
    assert schedule.take(0, 0) != schedule.take(1, 0)
    assert schedule.take(0, 0) != Schedule(20, 20, 1, 1, seed=1).take(0, 0)


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4))
def test_shares_cover_the_validation_with_as_many_batches_for_each_worker(count: int, batch_size: int, workers: int) -> None:
    parts = [shares(count, batch_size, rank, workers) for rank in range(workers)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(count))
    assert len({len(part) for part in parts}) == 1


def test_packed_rows_lie_end_to_end_and_predict_only_within_themselves() -> None:
    batch = collate(DATA, [0, 1], packed=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.row_lengths == [3, 2, 3]
    assert batch.supervised.tolist() == [0, 1, 3, 6]
    assert batch.targets.tolist() == [2, 3, 5, 8]
    assert batch.tokens == 8


def test_padded_rows_have_the_same_targets() -> None:
    batch = collate(DATA, [0, 1], packed=False)
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
