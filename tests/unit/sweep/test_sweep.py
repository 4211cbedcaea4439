"""Sweeps without Ray: how cores are shared out, which trial is best, what is gone on with, and what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_ray.cluster import Cluster
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.sweep import Asha, Space, SweepConf
from llm_ray.errors import ClusterError, RunError
from llm_ray.sweep.folder import SweepFolder, Trial, best_of, history
from llm_ray.sweep.report import make_report, write_report
from llm_ray.sweep.search import make_scheduler, make_searcher, slots_of, wanted_trials
from llm_ray.sweep.space import from_optuna, importance, to_optuna

RATE, RANK = "training.learning_rate", "tuning.lora.r"
CONF = SweepConf(
    name="s",
    config="lora",
    search={RATE: Space(loguniform=(1e-4, 1e-2)), RANK: Space(choice=(8, 16, 32))},
    trials=6,
)


def base_in(folder: Path, **runtime: Any) -> FinetuneConf:
    return FinetuneConf.model_validate(
        {
            "name": "base",
            "model": {"base": "m"},
            "data": {"train": "rows.jsonl"},
            "paths": {"runs": folder / "runs"},
            "runtime": runtime,
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    made = SweepFolder(CONF, base_in(tmp_path))
    made.begin()
    return made


def trial(number: int, metric: float | None, state: Any = "done", rate: float = 1e-3, rank: int = 8) -> Trial:
    points = [] if metric is None else [(0.25, metric + 1), (1.0 if state == "done" else 0.5, metric)]
    return Trial(number, {RATE: rate, RANK: rank}, state, metric, points[-1][0] if points else 0.0, 2.0, "", points)


# Cores ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "sweep", "runtime", "expected"),
    [
        ([2], {}, {}, (2, 1)),
        ([16], {}, {}, (4, 4)),
        ([16], {"concurrent": 2}, {}, (2, 8)),
        ([16], {"trials": 1}, {}, (1, 16)),
        ([16], {"cpus": 6}, {}, (4, 1)),
        ([16], {}, {"cpus_per_worker": 4}, (4, 4)),
        ([16], {"trials": 3}, {"cpus_per_worker": 4}, (3, 4)),
        ([8, 8], {"concurrent": 3}, {}, (3, 4)),  # one host has room for two of 4
        ([16], {}, {"workers": 2}, (4, 2)),
    ],
)
def test_cores_are_shared_out(
    tmp_path: Path, nodes: list[int], sweep: dict[str, Any], runtime: dict[str, Any], expected: tuple[int, int]
) -> None:
    conf = CONF.model_copy(update=sweep)
    cluster = Cluster({f"n{number}": cpus for number, cpus in enumerate(nodes)}, ["h"])
    slots = slots_of(conf, base_in(tmp_path, **runtime), cluster)
    assert (slots.trials, slots.cpus) == expected
    assert slots.trials * slots.workers * slots.cpus <= min(sum(nodes), conf.cpus or 99)


@pytest.mark.parametrize(
    ("sweep", "runtime"), [({"concurrent": 3}, {}), ({}, {"cpus_per_worker": 4}), ({"cpus": 1}, {"workers": 2})]
)
def test_trials_without_room_are_refused(tmp_path: Path, sweep: dict[str, Any], runtime: dict[str, Any]) -> None:
    with pytest.raises(ClusterError, match=r"lower concurrent, or runtime\.workers or runtime\.cpus_per_worker"):
        slots_of(CONF.model_copy(update=sweep), base_in(tmp_path, **runtime), Cluster({"n": 2}, ["h"]))


# The best -------------------------------------------------------------------------------------------------------------


def test_the_best_is_chosen_among_trials_trained_to_their_end() -> None:
    trials = [trial(1, 2.0), trial(2, 1.5), trial(3, 1.0, "stopped"), trial(4, None, "failed"), trial(5, 0.5, "begun")]
    assert best_of(trials, "min") == trials[1]
    assert best_of(trials, "max") == trials[0]
    assert best_of(trials[2:], "min") == trials[2]
    assert best_of([trials[3]], "min") is None


def test_a_metric_is_that_of_the_weights_that_would_be_exported() -> None:
    rows = [
        {"step": 0, "validation_loss": 0.1},
        {"step": 1, "total_steps": 4, "loss": 1.0},
        {"step": 2, "total_steps": 4, "validation_loss": 3.0, "validation_rewards/accuracies": 0.5},
        {"step": 3, "total_steps": 4, "validation_loss": 2.0, "validation_rewards/accuracies": 0.4},
        {"step": 4, "total_steps": 4, "validation_loss": 2.5, "validation_rewards/accuracies": 0.9},
    ]
    assert history(rows, "loss", best_checkpoint=True) == [(0.5, 3.0), (0.75, 2.0), (1.0, 2.0)]
    assert history(rows, "loss", best_checkpoint=False) == [(0.5, 3.0), (0.75, 2.0), (1.0, 2.5)]
    assert history(rows, "accuracy", best_checkpoint=True) == [(0.5, 0.5), (0.75, 0.4), (1.0, 0.4)]


# Going on -------------------------------------------------------------------------------------------------------------


def test_trials_are_read_as_written(folder: SweepFolder) -> None:
    first = folder.propose({RATE: 1e-3, RANK: 8})
    folder.write(trial(2, 1.5))
    assert folder.trials() == [first, trial(2, 1.5)]
    assert folder.propose({RATE: 2e-3, RANK: 8}).number == 3
    (folder.trials_folder / "trial-002" / "trial.json").write_text("{")
    with pytest.raises(RunError, match=r"trial-002/trial\.json cannot be read.*delete its folder"):
        folder.trials()


def test_a_sweep_goes_on_with_other_limits_but_not_with_other_results(folder: SweepFolder, tmp_path: Path) -> None:
    more = {"trials": 20, "hours": 1.0, "concurrent": 1, "seed": 1, "asha": Asha(enabled=False)}
    SweepFolder(CONF.model_copy(update=more), base_in(tmp_path, workers=2)).begin()
    search = {**CONF.search, RANK: Space(choice=(8, 64))}
    with pytest.raises(RunError, match=r"with a different conf:\n.*search\.tuning\.lora\.r\.choice.*\n?.*--force"):
        SweepFolder(CONF.model_copy(update={"search": search}), base_in(tmp_path)).begin()
    base = base_in(tmp_path)
    longer = base.model_copy(update={"data": base.data.model_copy(update={"max_length": 64})})
    with pytest.raises(RunError, match=r"data\.max_length: 512 -> 64"):
        SweepFolder(CONF, longer).begin()


def test_a_run_of_the_same_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "runs" / "s").mkdir(parents=True)
    (tmp_path / "runs" / "s" / "run.json").write_text("{}")
    with pytest.raises(RunError, match="is a run, not made by a sweep: use another name"):
        SweepFolder(CONF, base_in(tmp_path)).refuse_run()


def test_trials_that_ended_are_known_and_those_broken_off_come_first(folder: SweepFolder) -> None:
    folder.write(trial(1, 1.5))
    folder.write(trial(2, None, "failed"))
    folder.write(trial(3, 1.4, "begun", rate=5e-3))
    searcher = make_searcher(folder)
    states = [known.state.name for known in searcher._ot_study.trials]
    assert states == ["COMPLETE", "FAIL", "WAITING"]
    assert searcher.suggest("a") == {"trial": 3}
    assert searcher._ot_trials["a"].params[RATE] == 5e-3
    assert searcher.suggest("b") == {"trial": 4}
    new = folder.trials()[-1]
    assert new.state == "begun" and 1e-4 <= new.values[RATE] <= 1e-2 and new.values[RANK] in (8, 16, 32)


def test_a_small_space_is_gone_through_once(tmp_path: Path) -> None:
    conf = CONF.model_copy(update={"search": {RANK: Space(choice=(8, 16)), RATE: Space(choice=("auto", 1e-3))}})
    folder = SweepFolder(conf, base_in(tmp_path))
    folder.begin()
    assert wanted_trials(conf) == 4
    folder.write(Trial(1, {RANK: 16, RATE: "auto"}, "done", 1.0, 1.0, 1.0, "", [(1.0, 1.0)]))
    searcher = make_searcher(folder)
    for name in "abc":
        searcher.suggest(name)
    tried = [(one.values[RANK], one.values[RATE]) for one in folder.trials()]
    assert sorted(tried, key=str) == sorted([(16, "auto"), (8, "auto"), (8, 1e-3), (16, 1e-3)], key=str)


def test_asha_knows_the_trials_that_ended_before(folder: SweepFolder) -> None:
    for number in range(1, 5):
        folder.write(trial(number, 1.0 + number / 10))
    scheduler = make_scheduler(folder)

    class New:
        trial_id = "new"

    scheduler.on_trial_add(None, New)
    assert scheduler.on_trial_result(None, New, {"percent": 30, "metric": 9.0}) == "STOP"
    scheduler.on_trial_add(None, New)
    assert scheduler.on_trial_result(None, New, {"percent": 30, "metric": 0.1}) == "CONTINUE"


# What is told ---------------------------------------------------------------------------------------------------------


def test_values_pass_through_optuna_as_they_are() -> None:
    conf = CONF.model_copy(
        update={"search": {"a": Space(choice=(None, True, 1, "x", ["q", "v"])), "b": Space(integers=(1, 5))}}
    )
    for value in conf.search["a"].choice or ():
        assert from_optuna(conf, to_optuna(conf, {"a": value, "b": 3})) == {"a": value, "b": 3}


def test_the_key_that_matters_is_the_important_one() -> None:
    trials = [
        trial(number, 1.0 + 10 * abs(rate - 5e-3), rate=rate, rank=(8, 16, 32)[number % 3])
        for number, rate in enumerate([1e-4, 5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 7e-3, 8e-3, 9e-3, 1e-2])
    ]
    found = importance(CONF, trials)
    assert list(found) == [RATE, RANK] and found[RATE] > 0.6
    assert sum(found.values()) == pytest.approx(1)
    assert importance(CONF, trials[:3]) == {}


def test_the_report(folder: SweepFolder) -> None:
    rates = [1e-4, 1e-3, 2e-3, 5e-3, 1e-2]
    for number, rate in enumerate(rates, 1):
        folder.write(trial(number, 2.0 - 100 * rate, rate=rate, rank=8 if number % 2 else 16))
        rows = [{"step": 0, "validation_loss": 3.0}, {"step": 2, "total_steps": 2, "validation_loss": 2.0 - rate}]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder.trials_folder / f"trial-00{number}" / "metrics.jsonl").write_text(lines)
    folder.write(trial(6, None, "failed"))
    report = make_report(
        folder, {"base": {"validation_loss": 3.0}, "finetuned": {"validation_loss": 1.1, "exact_match": 0.5}}
    )
    head, first, *_, last = report.table()
    assert head == ("trial", "state", "loss", "trained", "seconds", "learning_rate", "r")
    assert first == ("trial-005", "done", "1.0000", "100%", "2", "0.01", "8")
    assert last[:3] == ("trial-006", "failed", "")
    assert report.held_out_lines() == ["loss: base model 3.0000, best trial 1.1000", "exact match: best trial 0.5000"]
    write_report(folder, report)
    text = (folder.path / "report.md").read_text()
    assert "Best: trial-005, loss 1.0000" in text and "- loss: base model 3.0000" in text
    assert json.loads((folder.path / "report.json").read_text())["best"]["number"] == 5
    for name in ("curves.png", "importance.png"):
        assert (folder.path / name).read_bytes().startswith(b"\x89PNG")
