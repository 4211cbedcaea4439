"""Looking at runs again and again: what changed is seen, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path

from llm_ray.app.confs import conf_of
from llm_ray.app.runs import metrics, seconds_left, stamp, watch_runs
from llm_ray.conf.finetune import FinetuneConf
from tests.runs import opened_run


def _conf(tmp_path: Path, smollm2: Path) -> FinetuneConf:
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}\n')
    return conf_of({"train": str(rows), "model": str(smollm2), "name": "watched"}, tmp_path)


def test_a_run_is_watched_while_it_works_and_ends(tmp_path: Path, smollm2: Path) -> None:
    conf = _conf(tmp_path, smollm2)
    runs = conf.paths.runs
    assert watch_runs(runs) == []
    seen = [stamp(runs, "watched")]
    with opened_run(conf, force=False):
        seen.append(stamp(runs, "watched"))
        assert [run.state for run in watch_runs(runs)] == ["running"]
        row = {"step": 1, "total_steps": 5, "loss": 2.5, "seconds": 3.0, "tokens": 60}
        (conf.run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        seen.append(stamp(runs, "watched"))
        (run,) = watch_runs(runs)
        assert (run.step, run.loss) == (1, 2.5)
        assert watch_runs(runs)[0] is run  # not read again
        assert metrics(runs, "watched") == [row]
        assert seconds_left([row]) == 12
    seen.append(stamp(runs, "watched"))
    assert len(set(seen)) == len(seen)
    assert [run.state for run in watch_runs(runs)] == ["done"]


def test_how_long_it_goes_on_is_told_by_steps_alone() -> None:
    assert seconds_left([]) is None
    assert seconds_left([{"step": 0, "validation_loss": 3.0}]) is None
