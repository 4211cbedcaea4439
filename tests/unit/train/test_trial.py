"""The first two measurements of a trial: parts of a pass, from whose difference its total cost is extrapolated."""

from __future__ import annotations

import numpy as np
import pytest

from llm_ray.train.trial import _parts, _why_ended


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lengths", [[25, 24, 26], [9], [100, 1, 1, 1], [12] * 64, [3, 90, 3, 90, 3, 90]])
def test_the_second_part_has_more_than_the_first_unless_that_is_all(lengths: list[int], packed: bool) -> None:
    rows = list(range(len(lengths)))
    few, more = _parts(rows, np.array(lengths), packed)
    assert few and rows[: len(few)] == few and rows[: len(more)] == more
    assert len(more) > len(few) or few == rows


def test_parts_are_an_eighth_and_a_quarter_of_many_rows() -> None:
    few, more = _parts(list(range(64)), np.full(64, 10), True)
    assert (len(few), len(more)) == (8, 16)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-9, "the trial steps were killed, most often because memory ran out"),
        (-11, "ended by SIGSEGV"),
        (1, "ended with code 1: what it wrote above says why"),
    ],
)
def test_only_a_killed_trial_may_have_run_out_of_memory(code: int, reason: str) -> None:
    assert reason in _why_ended(code)
