from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llm_ray.runs.metrics import METRICS, MetricsWriter, finite, read_metrics


def write(folder: Path, steps: range, resume: int = 0, tensorboard: bool = False) -> None:
    writer = MetricsWriter(folder, tensorboard, resume)
    for step in steps:
        writer.write({"step": step, "loss": step / 10})
    writer.close()


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / METRICS)]


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_from_step=0)
    writer.write({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / METRICS) == [{"step": 1, "loss": 2.5}]
    writer.close()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    write(tmp_path, range(6, 10), resume=5)
    assert steps(tmp_path) == list(range(10))


def test_a_run_from_the_start_loses_the_old_rows(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    write(tmp_path, range(2))
    assert steps(tmp_path) == [0, 1]


def test_a_torn_line_is_left_out_and_cut_off_on_resuming(tmp_path: Path) -> None:
    write(tmp_path, range(4))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path / METRICS, last=2)] == [2, 3]
    write(tmp_path, range(4, 6), resume=3)
    assert steps(tmp_path) == list(range(6))


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / METRICS) == read_metrics(tmp_path / METRICS, last=3) == []


@pytest.mark.parametrize("last", [0, 1, 7, 999, 5000])
def test_the_tail_is_the_end_of_the_whole(tmp_path: Path, last: int) -> None:
    write(tmp_path, range(1000))
    assert [row["step"] for row in read_metrics(tmp_path / METRICS, last)] == list(range(1000))[max(0, 1000 - last) :]


def test_the_tail_of_a_large_file_is_cheap(tmp_path: Path) -> None:
    # Sparse: a reader of the whole would need a gigabyte.
    with (tmp_path / METRICS).open("wb") as file:
        file.seek(1 << 30)
        file.write(b'\n{"step": 1}\n{"step": 2}\n')
    assert read_metrics(tmp_path / METRICS, last=1) == [{"step": 2}]


def test_validation_loss_is_joined_by_its_perplexity(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_from_step=0)
    writer.write({"step": 1, "validation_loss": 2.0})
    writer.write({"step": 2, "validation_loss": 1e6})
    writer.close()
    first, second = read_metrics(tmp_path / METRICS)
    assert first["validation_perplexity"] == pytest.approx(math.exp(2))
    assert second["validation_perplexity"] is None


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_from_step=0)
    writer.write({"step": 1, "loss": math.nan, "gradient_norm": math.inf})
    writer.close()
    text = (tmp_path / METRICS).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "gradient_norm": None}
    assert finite({"a": [math.nan, (1.0, -math.inf)]}) == {"a": [None, [1.0, None]]}


def test_tensorboard_shows_the_steps_of_a_resumed_run_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(8), tensorboard=True)
    write(tmp_path, range(6, 10), resume=5, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(10))
    write(tmp_path, range(3), tensorboard=True)
    assert [event.step for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")] == [
        0,
        1,
        2,
    ]
