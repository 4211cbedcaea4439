"""Values chosen for `auto`: complete, deterministic, explained, and with the trends of the measured table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.conf.finetune import EarlyStopping, FinetuneConf
from llm_ray.data.prepare import DataStats, SplitStats
from llm_ray.train.auto import Choice, choose


def data_of(
    rows: int, mean: float = 60, validation: int = 0, answer: float = 20, answers: int | None = None
) -> DataStats:
    def split(count: int) -> SplitStats:
        tokens = round(count * mean)
        return SplitStats(
            rows=count,
            sequences=count,
            tokens=tokens,
            supervised_tokens=tokens // 3,
            supervised_share=1 / 3,
            longest=round(mean),
            longest_sequence=round(mean),
            mean=mean,
            answer=answer,
        )

    held = split(validation) if validation else None
    return DataStats(
        formats=["alpaca"],
        files=[],
        max_length=1024,
        read=rows + validation,
        answers=rows if answers is None else answers,
        train=split(rows),
        validation=held,
    )


def conf_of(training: dict[str, Any] | None = None, **tuning: Any) -> FinetuneConf:
    return FinetuneConf.model_validate(
        {
            "name": "t",
            "model": {"base": "b"},
            "data": {"train": "x.jsonl"},
            "training": training or {},
            "tuning": tuning,
        }
    )


def chosen(
    rows: int, width: int = 576, training: dict[str, Any] | None = None, validation: int = 0, **tuning: Any
) -> Choice:
    return choose(conf_of(training, **tuning), data_of(rows, validation=validation), width)


@given(
    st.integers(1, 10**6),
    st.integers(16, 16384),
    st.sampled_from(["lora", "full"]),
    st.sampled_from(["sft", "pretrain", "dpo", "orpo", "kto"]),
    st.booleans(),
)
def test_nothing_stays_auto_and_each_choice_has_its_reason(
    rows: int, width: int, method: str, objective: str, held: bool
) -> None:
    choice = chosen(rows, width, validation=10 * held, method=method, objective=objective)
    training = choice.conf.training
    assert "auto" not in training.model_dump(exclude={"precision"}).values()
    dropout = {"tuning.lora.dropout"} if method == "lora" else set()
    assert set(choice.reasons) == {"training.epochs", "training.global_batch_size", "training.learning_rate"} | dropout
    assert choice.conf.tuning.lora.dropout in (0.0, 0.1)
    assert training == FinetuneConf.model_validate(choice.conf.model_dump(mode="json")).training, (
        "workers get it as JSON"
    )
    assert training.epochs >= 1 and training.global_batch_size >= 1 and 0 < training.learning_rate < 0.1
    assert len(choice.lines()) == len(choice.reasons)


def test_what_is_set_stays() -> None:
    choice = chosen(90, training={"epochs": 2.5, "global_batch_size": 3, "learning_rate": 1e-5}, lora={"dropout": 0.2})
    assert (
        choice.conf.training.epochs,
        choice.conf.training.global_batch_size,
        choice.conf.training.learning_rate,
    ) == (2.5, 3, 1e-5)
    assert choice.reasons == {}
    assert choice.conf.tuning.lora.dropout == 0.2
    assert choice.conf.training.early_stopping is None, "who sets the epochs gets them"


def test_max_steps_rules_over_epochs() -> None:
    choice = chosen(90, training={"max_steps": 5, "global_batch_size": 9}, validation=20)
    assert choice.conf.training.max_steps == 5
    assert "training.epochs" not in choice.reasons
    assert choice.conf == FinetuneConf.model_validate(choice.conf.model_dump(mode="json")), "workers get it as JSON"
    assert choice.conf.training.early_stopping is None


def test_directions() -> None:
    def of(choice: Choice) -> tuple[float, float, float]:
        training = choice.conf.training
        return float(training.epochs), float(training.global_batch_size), float(training.learning_rate)

    small, large = of(chosen(40)), of(chosen(50_000))
    assert small[0] > large[0] and small[1] < large[1], "small sets: more passes, smaller batches"
    assert of(chosen(90, method="full"))[2] < of(chosen(90))[2] / 4, "full weights bear lower rates"
    assert of(chosen(90, method="full"))[0] <= of(chosen(90))[0], "and need no more passes"
    assert of(chosen(90, width=4096))[2] < of(chosen(90, width=576))[2], "wide models bear lower rates"
    assert of(chosen(5000, objective="pretrain", method="full"))[0] == 1


@pytest.mark.parametrize(
    ("rows", "answer", "epochs"),
    [(40, 15, 20), (90, 15, 13), (150, 15, 8), (300, 15, 8), (999, 30, 8), (2000, 15, 4), (5000, 15, 2)],
)
def test_facts_are_seen_as_often_in_larger_sets(rows: int, answer: int, epochs: int) -> None:
    assert choose(conf_of(), data_of(rows, answer=answer), width=576).conf.training.epochs == epochs


@pytest.mark.parametrize(("rows", "answers", "epochs"), [(300, 100, 8), (300, 30, 4), (999, 333, 8), (999, 2, 3)])
def test_answers_that_many_questions_share_are_seen_in_fewer_epochs(rows: int, answers: int, epochs: int) -> None:
    """Three wordings of each question, ten as in the quickstart, and two classes."""
    choice = choose(conf_of(), data_of(rows, answers=answers), width=576)
    assert choice.conf.training.epochs == epochs
    assert f"{rows} rows with {answers} different answers" in choice.reasons["training.epochs"]


def test_long_answers_are_seen_less_often() -> None:
    assert choose(conf_of(), data_of(500, answer=120), width=576).conf.training.epochs == 3


def test_a_mixture_of_experts_has_no_dropout() -> None:
    assert choose(conf_of(), data_of(90), width=576).conf.tuning.lora.dropout == 0.1
    assert choose(conf_of(), data_of(90), width=576, experts=True).conf.tuning.lora.dropout == 0.0


def test_validation_guards_auto_epochs_alone() -> None:
    assert isinstance(chosen(500, validation=50).conf.training.early_stopping, EarlyStopping)
    assert chosen(500).conf.training.early_stopping is None
    assert chosen(500, validation=50, training={"early_stopping": None}).conf.training.early_stopping is None


def test_preferences_take_a_tenth_of_the_rate_no_dropout_and_few_passes() -> None:
    sft, dpo = chosen(300), chosen(300, objective="dpo")
    assert float(dpo.conf.training.learning_rate) == pytest.approx(float(sft.conf.training.learning_rate) / 10, rel=0.1)
    assert (sft.conf.tuning.lora.dropout, dpo.conf.tuning.lora.dropout) == (0.1, 0.0)
    assert dpo.conf.training.epochs == chosen(100, objective="dpo").conf.training.epochs == 3
    assert "objective dpo" in dpo.reasons["training.learning_rate"] and "pairs" in dpo.reasons["training.epochs"]


def test_odds_ratios_teach_answers_as_sft_does() -> None:
    sft, orpo = chosen(300).conf, chosen(300, objective="orpo").conf
    assert orpo.training == sft.training and orpo.tuning.lora == sft.tuning.lora


def test_ratings_take_a_fifth_of_the_rate_and_steps_in_which_answers_can_be_compared() -> None:
    sft, kto = chosen(300), chosen(300, objective="kto")
    assert float(kto.conf.training.learning_rate) == pytest.approx(float(sft.conf.training.learning_rate) / 5, rel=0.1)
    assert (kto.conf.tuning.lora.dropout, kto.conf.training.epochs) == (0.0, 3)
    assert "300 answers make" in kto.reasons["training.epochs"]
    few = chosen(90, objective="kto").conf.training.global_batch_size
    assert (chosen(90).conf.training.global_batch_size, few) == (4, 8)
