"""Rows of every format made into conversations, and what is said of those that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_ray.conf.schema import FinetuneConf
from llm_ray.data.formats import Conversation, Formatter, Text
from llm_ray.data.sources import Row
from llm_ray.errors import ConfError, DataError

Make = Callable[..., FinetuneConf]
FILE = "/data/rows.jsonl"


@pytest.fixture
def convert(conf: Make) -> Callable[..., Conversation | Text]:
    def of(values: dict[str, Any], *, objective: str = "sft", **data: Any) -> Conversation | Text:
        return Formatter(conf(FILE, objective=objective, **data).data, pretrain=objective == "pretrain")(Row(FILE, 7, values))

    return of


def qa(question: str, answer: str, system: str | None = None) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages)


Convert = Callable[..., Conversation | Text]

GOOD: list[tuple[str, dict[str, Any], Conversation]] = [
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, qa("Add.\n\n1 2", "3")),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "text": "…"}, qa("Hi", "Hello")),
    ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be brief."}, qa("Hi", "Hello", "Be brief.")),
    ("dolly", {"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "qa"}, qa("Who?\n\nAnn did.", "Ann")),
    ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, qa("Hi", "Hello")),
    ("messages", {"messages": qa("Hi", "Hello", "Be brief.").messages}, qa("Hi", "Hello", "Be brief.")),
    ("messages", {"messages": json.dumps(qa("Hi", "Hello").messages)}, qa("Hi", "Hello")),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        qa("Hi", "Hello"),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
        qa("Hi", "Hello", "S"),
    ),
    (
        "sharegpt",
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "tools": "[]"},
        qa("Hi", "Hello"),
    ),
]


@pytest.mark.parametrize(("form", "values", "conversation"), GOOD)
def test_told_and_found_out(convert: Convert, form: str, values: dict[str, Any], conversation: Conversation) -> None:
    assert convert(values) == conversation
    assert convert(values, format=form) == conversation


def test_text(convert: Convert) -> None:
    assert convert({"text": "Water."}, objective="pretrain") == Text("Water.")
    assert convert({"body": "Water."}, objective="pretrain", columns={"text": "body"}) == Text("Water.")
    assert convert({"instruction": "a", "output": "b", "text": "c"}, objective="pretrain") == Text("c")


def test_columns_are_renamed(convert: Convert) -> None:
    columns = {"instruction": "question", "output": "reply"}
    assert convert({"question": "Hi", "reply": "Hello"}, columns=columns) == qa("Hi", "Hello")
    # One's own column may bear the name of another of the format's.
    assert convert({"input": "Hi", "output": "Hello"}, columns={"instruction": "input"}) == qa("Hi", "Hello")


def test_system_is_a_default(convert: Convert) -> None:
    assert convert({"prompt": "Hi", "completion": "Hello"}, system="Be brief.") == qa("Hi", "Hello", "Be brief.")
    assert convert({"messages": qa("Hi", "Hello", "Theirs.").messages}, system="Be brief.") == qa("Hi", "Hello", "Theirs.")


def test_sharegpt_calls_and_observations(convert: Convert) -> None:
    tool = {"name": "weather", "description": "Tells it.", "parameters": {}}
    conversations = [
        {"from": "human", "value": "Weather?"},
        {"from": "gpt", "value": "I look."},
        {"from": "function_call", "value": '[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "weather", "arguments": "{}"}]'},
        {"from": "observation", "value": "3"},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "3 and 4."},
    ]
    found = convert({"conversations": conversations, "tools": json.dumps([tool])})
    assert found == Conversation(
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
                    {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {}}},
                ],
            },
            {"role": "tool", "content": "3", "tool_call_id": "call00000", "name": "weather"},
            {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": "weather"},
            {"role": "assistant", "content": "3 and 4."},
        ],
        [{"type": "function", "function": tool}],
    )


def test_openai_calls(convert: Convert) -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "3"},
        {"role": "assistant", "content": "3."},
    ]
    found = convert({"messages": messages, "tools": [{"type": "function", "function": {"name": "weather"}}]})
    assert isinstance(found, Conversation)
    assert found.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
    }
    assert found.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "abc", "name": "weather"}


def test_each_file_has_its_own_format(conf: Make) -> None:
    formatter = Formatter(conf(FILE).data, pretrain=False)
    assert formatter(Row("/a.json", 1, {"instruction": "Hi", "output": "Hello"})) == qa("Hi", "Hello")
    assert formatter(Row("/b.json", 1, {"prompt": "Hi", "completion": "Hello"})) == qa("Hi", "Hello")
    assert formatter.formats == ["alpaca", "prompt_completion"]
    with pytest.raises(DataError, match=r"/b\.json:2: format prompt_completion needs 'prompt', which is missing and 'completion'"):
        formatter(Row("/b.json", 2, {"instruction": "Hi", "output": "Hello"}))


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "cannot tell the format: the row has no columns"),
    (
        {"question": "a", "answer": "b"},
        r"cannot tell the format: the row has the columns question, answer; known are .*alpaca \(instruction, output\).*data\.columns",
    ),
    ({"promt": "a", "completions": "b"}, "'promt' looks like 'prompt', 'completions' looks like 'completion'"),
    ({"text": "a"}, "plain text has no answers to learn by tuning.objective sft: use objective pretrain"),
    ({"conversations": [], "chosen": {}, "rejected": {}}, r"preference pairs \(chosen, rejected\)"),
    ({"instruction": "a", "output": None}, "format alpaca needs 'output', which is null here"),
    ({"instruction": "a", "output": 42}, "'output' must be text, but is 42"),
    ({"instruction": " ", "output": "b"}, "'instruction' is empty"),
    ({"messages": []}, r"'messages' must be a list of turns, but is \[\]"),
    ({"messages": "[{"}, "'messages' is not JSON: .* at character"),
    ({"messages": "hello"}, "'messages' is not JSON"),
    ({"messages": ["hello"]}, "turn 1 of 'messages' must be an object, but is \"hello\""),
    (
        {"messages": [{"role": "asistant", "content": "a"}]},
        r"turn 1 of 'messages': role is \"asistant\"; known are system, .* \(nearest: assistant\)",
    ),
    ({"messages": [{"content": "a"}]}, "turn 1 of 'messages': role is null"),
    ({"messages": [{"role": "user"}]}, "turn 1 of 'messages': 'content' must be text, but is null"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'content' must be text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "a function call must be an object with name and arguments"),
    ({"conversations": [{"from": "robot", "value": "a"}]}, 'from is "robot"; known are system, human'),
    ({"conversations": [{"from": "human", "value": None}]}, "'value' must be text, but is null"),
    ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "the function call is not JSON"),
    ({"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}]}, "the arguments of f must be an object"),
    ({"conversations": [{"from": "human", "value": "a"}], "tools": "{"}, "'tools' is not JSON"),
    ({"conversations": [{"from": "human", "value": "a"}], "tools": {"a": 1}}, "'tools' must be a list of functions"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_rows_name_file_and_line(convert: Convert, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        convert(values)
    assert str(error.value).startswith(f"{FILE}:7: ")


def test_pretrain_without_text(convert: Convert) -> None:
    with pytest.raises(DataError, match=r"pretrain needs a column 'text', the row has the columns body: .* e\.g\. \{text: body\}"):
        convert({"body": "a"}, objective="pretrain")


def test_renamed_column_that_is_not_there(convert: Convert) -> None:
    with pytest.raises(DataError, match=r"no column 'question', which data\.columns takes as 'instruction'; the row has the columns frage"):
        convert({"frage": "a"}, columns={"instruction": "question"})


def test_columns_with_an_unknown_name(conf: Make) -> None:
    with pytest.raises(ConfError, match=r"'instructions' is no column of format alpaca; .*nearest: instruction"):
        Formatter(conf(FILE, format="alpaca", columns={"instructions": "question"}).data, pretrain=False)
