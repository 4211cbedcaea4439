"""Warnings about plans that cannot work, and about runs that have not learned."""

from __future__ import annotations

from typing import Any

import pytest

from llm_ray.data.encode import PAIR_TOO_LONG, TOO_LONG
from llm_ray.data.prepare import DataStats
from llm_ray.train.auto import choose
from llm_ray.train.plan import warnings
from llm_ray.train.verdict import not_learned
from tests.unit.train.test_auto import conf_of, data_of

PARAMS = {"learning_rate": 1e-3, "epochs": 3.0}


def warned(data: DataStats, steps: int = 100, training: dict[str, Any] | None = None, **tuning: Any) -> list[str]:
    conf = choose(conf_of(training, **tuning), data, width=576).conf
    return warnings(conf, data, steps, width=576)


def test_a_good_plan_has_no_warnings() -> None:
    assert warned(data_of(500, validation=50)) == []
    assert warned(data_of(90)) == []


@pytest.mark.parametrize(
    ("change", "training", "words"),
    [
        ({"truncated": 60}, {}, "answers of 60 of 100 rows are cut off by data.max_length 1024"),
        ({"dropped": {TOO_LONG: 51}}, {}, "answers of 51 of 100 rows are cut off"),
        ({"dropped": {PAIR_TOO_LONG: 51}}, {}, "answers of 51 of 100 rows are cut off"),
        ({"repeated": 12}, {}, "training rows that repeat another one: 12 of 90"),
        (
            {"contradicting": 1},
            {},
            "training rows with the same question as another one, but a different answer: 1 of 90",
        ),
        ({"leaked": 4}, {}, "validation rows with the same question as a training row: 4 of 10"),
        ({}, {"learning_rate": 0.1}, "training.learning_rate 0.1 is"),
        ({}, {"learning_rate": 1e-7}, "little will be learned; raise it"),
    ],
)
def test_what_speaks_against_a_plan(change: dict[str, Any], training: dict[str, Any], words: str) -> None:
    data = data_of(90, validation=10).model_copy(update=change)
    (warning,) = warned(data, training=training)
    assert words in warning


def test_contradictions_between_pairs_are_of_another_kind() -> None:
    data = data_of(90).model_copy(update={"contradicting": 2})
    (warning,) = warned(data, objective="dpo")
    assert "training pairs that prefer the answer that another pair rejects, out of the same two: 2 of 90" in warning


def rated(good: int, bad: int) -> DataStats:
    data = data_of(good + bad)
    return data.model_copy(update={"train": data.train.model_copy(update={"good": good})})


def test_answers_of_one_rating() -> None:
    (warning,) = warned(rated(90, 0), objective="kto")
    assert (
        "all 90 training answers are rated good: " in warning
        and "rows with label false, or use objective sft" in warning
    )
    (warning,) = warned(rated(0, 90), objective="kto")
    assert "all 90 training answers are rated bad: " in warning and warning.endswith("add rows with label true")


def test_ratings_out_of_balance_and_the_weights_that_balance_them() -> None:
    assert warned(rated(50, 40), objective="kto") == []
    for good, bad, key, weight in ((20, 70, "desirable_weight", 4), (70, 20, "undesirable_weight", 3)):
        (warning,) = warned(rated(good, bad), objective="kto")
        assert f"{good} training answers are rated good and {bad} bad" in warning
        assert warning.endswith(f"should be between 1 and 4/3; set tuning.kto.{key} {weight}")
        assert warned(rated(good, bad), objective="kto", kto={key: weight}) == []
    assert warned(rated(20, 70), objective="kto", kto={"undesirable_weight": 0}) == [], "as asked for"


def test_contradicting_ratings() -> None:
    data = rated(45, 45).model_copy(update={"contradicting": 2})
    (warning,) = warned(data, objective="kto")
    assert "training rows that rate the same answer differently than another one: 2 of 90" in warning


def test_few_steps_and_few_validation_rows() -> None:
    assert "6 optimizer steps will hardly change a model: raise training.epochs" in warned(data_of(90), steps=6)[0]
    assert "a validation split of 3 rows is too small to be meaningful" in warned(data_of(90, validation=3))[0]
    no_guard = {"best_checkpoint": False, "early_stopping": None}
    assert warned(data_of(90, validation=3), training=no_guard) == []


def losses(*values: float) -> list[dict[str, float]]:
    return [{"loss": value} for value in values]


def validations(*values: float) -> list[dict[str, float]]:
    return [{"step": i, "validation_loss": value, **({"loss": 1.0} if i else {})} for i, value in enumerate(values)]


def test_a_run_that_has_learned_is_not_complained_of() -> None:
    assert not_learned(validations(2.0, 1.5, 1.7), {"rows": 20, "unchanged": 3}, PARAMS) == []
    assert not_learned(losses(2.0, 1.5, 0.1), {}, PARAMS) == []
    assert not_learned([], {}, PARAMS) == [], "trained in another command"


@pytest.mark.parametrize(
    ("metrics", "evaluation", "words"),
    [
        (
            validations(2.0, 2.0, 1.999),
            {},
            "the validation loss has not fallen: 2.0000 before training, 1.9990 at best: raise",
        ),
        (validations(2.0, 2.3, 2.9), {}, "lower training.learning_rate (0.001)"),
        (losses(2.0, 1.99, 2.01), {}, "the training loss has not fallen: 2.0000 at first"),
        (losses(2.0), {}, "the training loss has not fallen"),
        (
            losses(2.0, 1.0),
            {"rows": 20, "unchanged": 19},
            "19 of 20 answers are unchanged (evaluation.md): raise training.epochs (3)",
        ),
    ],
)
def test_a_run_that_has_not_learned_says_so(
    metrics: list[dict[str, float]], evaluation: dict[str, int], words: str
) -> None:
    (reason,) = not_learned(metrics, evaluation, PARAMS)
    assert words in reason
