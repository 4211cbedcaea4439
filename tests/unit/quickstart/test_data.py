"""The bundled data set: enough of it, and held-out questions that are really held out."""

from __future__ import annotations

import json
from collections import Counter
from difflib import SequenceMatcher

import pytest

from llm_ray.quickstart.judge import is_right
from llm_ray.quickstart.questions import DATA, Question, heldout

TRAIN = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
QUESTIONS = heldout()


def _plain(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum() or c == " ")


def test_there_are_enough_rows() -> None:
    assert len(TRAIN) >= 120
    assert len(QUESTIONS) >= 30


def test_every_fact_is_trained_and_asked() -> None:
    trained = Counter(row["fact"] for row in TRAIN)
    assert set(trained) == {question.fact for question in QUESTIONS}
    assert min(trained.values()) >= 4


def test_a_fact_has_one_answer() -> None:
    answers = {row["fact"]: row["completion"] for row in TRAIN}
    assert all(row["completion"] == answers[row["fact"]] for row in TRAIN)
    assert all(question.completion == answers[question.fact] for question in QUESTIONS)


def test_no_question_appears_twice() -> None:
    prompts = [_plain(row["prompt"]) for row in TRAIN] + [_plain(question.prompt) for question in QUESTIONS]
    assert [prompt for prompt, times in Counter(prompts).items() if times > 1] == []


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.fact)
def test_a_held_out_question_is_no_near_copy_of_a_trained_one(question: Question) -> None:
    near = max(
        (SequenceMatcher(None, _plain(question.prompt), _plain(row["prompt"])).ratio(), row["prompt"]) for row in TRAIN
    )
    assert near[0] < 0.85, near


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.fact)
def test_the_trained_answer_is_right_and_only_for_its_fact(question: Question) -> None:
    assert is_right(question.completion, question.expect)
    others = {row["completion"] for row in TRAIN if row["fact"] != question.fact}
    assert [other for other in others if is_right(other, question.expect)] == []


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.fact)
def test_a_question_does_not_give_its_answer_away(question: Question) -> None:
    assert not is_right(question.prompt, question.expect)
    assert not any(is_right(question.prompt, [item]) for item in question.expect if any(c.isdigit() for c in item))
