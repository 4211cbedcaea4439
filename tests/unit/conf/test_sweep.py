"""Confs of sweeps: spaces, the finetune's keys in them, and errors that name file and key before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ray.conf.load import finetune_of, load_sweep
from llm_ray.conf.sweep import Space, SweepConf, with_values
from llm_ray.errors import ConfError

CONF = """\
name: s
config: base.yaml
set:
  training.epochs: 2
search:
  training.learning_rate: {loguniform: [1e-4, 1e-2]}
  tuning.lora.r: {choice: [8, 16]}
"""
BASE = "name: base\nmodel: {base: some-model}\ndata: {train: rows.jsonl, validation: 0.2}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(CONF)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "rows.jsonl").touch()
    return tmp_path


def test_a_sweep_and_its_finetune(here: Path) -> None:
    conf = load_sweep("s.yaml", ["trials=3"], (), here)
    base = finetune_of(conf, here)
    assert conf.config == str(here / "base.yaml")
    assert (base.training.epochs, base.data.train, conf.trials) == (2, (str(here / "rows.jsonl"),), 3)
    assert conf.search["training.learning_rate"] == Space(loguniform=(1e-4, 1e-2))
    assert conf.combinations is None
    assert base.paths.runs == here / "runs"


def test_what_is_searched_and_set_may_be_set_from_the_command_line(here: Path) -> None:
    given = ["search.tuning.lora.r.choice=[4, 64]", "set.training.epochs=3", "search.tuning.lora.alpha.integers=[8, 9]"]
    conf = load_sweep("s.yaml", given, (), here)
    assert conf.search["tuning.lora.r"].choice == (4, 64)
    assert conf.search["tuning.lora.alpha"].values == [8, 9]
    assert finetune_of(conf, here).training.epochs == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.tuning.lora.r.choice=[8]", "search.tuning.lora.r: choice has 1 value: give two or more"),
        ("search.tuning.lora.r.choice=[8, 8]", "has a value twice"),
        ("search.tuning.lora.r={}", "search.tuning.lora.r: has nothing: give exactly one of choice, uniform"),
        ("search.tuning.lora.r={choice: [1, 2], integers: [1, 2]}", "has choice and integers: give exactly one"),
        ("search.training.learning_rate.loguniform=[1e-2, 1e-4]", r"loguniform \[0.01, 0.0001\] is empty"),
        ("search.training.learning_rate.loguniform=[0, 1]", "begins at 0: it must be above 0"),
        ("search.training.learning_rate.loguniform=[1]", "search.training.learning_rate.loguniform is"),
        (
            "search.tuning.lora.r.choice=[0, 8]",
            r"search.tuning.lora.r: tuning.lora.r is 0: it must be an integer of at",
        ),
        ("search.training.warmup={uniform: [-1, 1]}", "search.training.warmup: training.warmup is -1.0: it must be"),
        (
            "search.training.learning_rat={choice: [1, 2]}",
            "no such key of a finetune; did you mean training.learning_rate",
        ),
        ("search.tuning.lora={choice: [1, 2]}", "search.tuning.lora: a section of a finetune's conf, not a key"),
        ("search.data.max_length={choice: [8, 16]}", "search.data.max_length: trials share their data and model"),
        ("search.training.seed={integers: [1, 2]}", "search.training.seed: trials share"),
        ("search.training.epochs={integers: [1, 3]}", "search.training.epochs: set has a value for it too"),
        ("search.tuning.dpo.beta={uniform: [0.1, 0.2]}", "it has no effect: tuning.objective is sft"),
        ("search.tuning.kto.beta={uniform: [0.1, 0.2]}", "it has no effect: tuning.objective is sft"),
        ("set.tuning.method=full", "search.tuning.lora.r: it has no effect: tuning.method is full"),
        (
            "search.training.max_steps={integers: [1, 3]}",
            "search.training.max_steps: training.epochs and training.max_steps are both",
        ),
        ("set.training.epochs=some", 'training.epochs is "some": it must be a number above 0 or auto'),
        ("set.data.validation=null", "data.validation is null, but trials are compared on validation rows"),
        (
            "metric=accuracy",
            "metric accuracy needs an objective that learns from pairs or rated answers, but tuning.objective is sft",
        ),
        ("config=nowhere", "no such file, and no shipped template of that name"),
        ("num_samples=3", "num_samples is neither a key of the conf nor a variable of s.yaml; did you mean trials"),
        ("trials=0", "trials is 0: it must be an integer of at least 1"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(here: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfError, match=message):
        load_sweep("s.yaml", [setting], (), here)


def test_ends_that_do_not_go_together_are_told(here: Path) -> None:
    given = ["set.tuning.objective=sft", "search.training.strategy={choice: [ddp, fsdp]}"]
    (here / "base.yaml").write_text(BASE + "runtime: {workers: 2}\n")
    ways = "search.training.accelerator={choice: [torch, ipex]}"
    with pytest.raises(
        ConfError, match=r's\.yaml:5: search: .*fsdp.*"ipex" cannot be combined: training\.accelerator ipex'
    ):
        load_sweep("s.yaml", [*given, ways], (), here)


def test_errors_name_the_files_line(here: Path) -> None:
    (here / "s.yaml").write_text(CONF.replace("[8, 16]", "[8, -1]"))
    with pytest.raises(ConfError, match=r"s\.yaml:7: search\.tuning\.lora\.r: tuning\.lora\.r is -1: "):
        load_sweep("s.yaml", (), (), here)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_are_compared_by_accuracy_where_the_loss_means_something_else(here: Path, objective: str) -> None:
    given = [f"set.tuning.objective={objective}", f"search.tuning.{objective}.beta={{uniform: [0.1, 0.2]}}"]
    with pytest.raises(ConfError, match=r"it changes what the loss means.*use metric: accuracy"):
        load_sweep("s.yaml", given, (), here)
    assert load_sweep("s.yaml", [*given, "metric=accuracy"], (), here).goal == "max"


def test_combinations() -> None:
    conf = SweepConf(name="s", config="lora", search={"a.b": Space(choice=(1, "x")), "c": Space(integers=(1, 3))})
    assert conf.combinations == 6
    assert conf.grid()[:2] == [{"a.b": 1, "c": 1}, {"a.b": 1, "c": 2}]
    plain = {"a": {"b": 0, "d": 1}, "c": 0}
    assert with_values(conf.grid()[-1], plain) == {"a": {"b": "x", "d": 1}, "c": 3}
    assert plain == {"a": {"b": 0, "d": 1}, "c": 0}
