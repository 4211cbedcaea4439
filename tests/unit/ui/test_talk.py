"""What the screens Ask and Deploy make of answers, fields and addresses."""

from __future__ import annotations

import json

import pytest

from llm_ray.errors import ConfError
from llm_ray.ui.fields import decimal, whole
from llm_ray.ui.figures import table
from llm_ray.ui.screens.deploy import snippets
from llm_ray.ui.talk import Said, Turn, parts, row, shown

TALK = [
    Turn("Hi", (Said("Hello", "5 tokens", whole=True), None)),
    Turn("And?", (Said("", "nothing listens"), Said("Yes", "", whole=True))),
]


def test_thoughts_and_tool_calls_are_pieces_of_their_own() -> None:
    assert parts("a<think>\nb\n</think>c") == [("", "a"), ("Thoughts", "b"), ("", "c")]
    assert parts("<think>still") == [("Thoughts", "still")]
    assert parts('<tool_call>{"name": "x"}</tool_call>') == [("Tool call", '```json\n{"name": "x"}\n```')]
    assert parts("x < y and <b>") == [("", "x < y and <b>")]


def test_a_talk_as_a_row_has_the_turns_that_were_answered() -> None:
    assert json.loads(row(TALK, 0, "Be brief")) == {
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    assert row([], 0, None) == ""


def test_each_side_shows_its_own_turns() -> None:
    assert [message["content"] for message in shown(TALK, 0)] == [
        "Hi",
        "Hello",
        "*5 tokens*",
        "And?",
        "nothing listens",
    ]
    assert [message["content"] for message in shown(TALK, 1)] == ["And?", "Yes"]


def test_numbers_that_may_be_empty() -> None:
    assert (whole("", "Port"), whole(None, "Port"), whole(" 8 ", "Port"), decimal("0.5", "Top p", most=1)) == (
        None,
        None,
        8,
        0.5,
    )
    for text in ("x", "0", "1.5", "nan", "inf"):
        with pytest.raises(ConfError, match="Port: "):
            whole(text, "Port")


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("task", ["chat", "completions", "embeddings"])
def test_snippets_are_programs(task: str, key: bool) -> None:
    curl, python, sdk = snippets("http://127.0.0.1:8000/v1", "quickstart", key, task)
    assert ("LLM_RAY_API_KEY" in curl, "LLM_RAY_API_KEY" in python, "LLM_RAY_API_KEY" in sdk) == (key, key, key)
    compile(python, "python", "exec")
    compile(sdk, "sdk", "exec")


def test_what_is_in_a_table_is_escaped() -> None:
    assert "<b>" not in table("<b>", ["<b>"], [["<b>"]])
