"""Rows of every format converted to conversations, and errors for invalid rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.formats import Conversation, Formatter, Text
from llm_ray.data.sources import Row
from llm_ray.errors import ConfError, DataError

Make = Callable[..., FinetuneConf]
FILE = "/data/rows.jsonl"


@pytest.fixture
def convert(conf: Make) -> Callable[..., Conversation | Text]:
    def of(values: dict[str, Any], *, objective: str = "sft", **data: Any) -> Conversation | Text:
        made = conf(FILE, objective=objective, **data)
        return Formatter(made.data, made.objective.reads)(Row(FILE, 7, values))

    return of


def qa(question: str, answer: str, system: str | None = None) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages)


Convert = Callable[..., Conversation | Text]

GOOD: list[tuple[str, dict[str, Any], Conversation]] = [
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, qa("Add.\n\n1 2", "3")),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "text": "…"}, qa("Hi", "Hello")),
    (
        "alpaca",
        {"instruction": "Sure?", "output": "Yes.", "history": [["Hi", "Hello"]]},
        Conversation([*qa("Hi", "Hello").messages, *qa("Sure?", "Yes.").messages]),
    ),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "history": []}, qa("Hi", "Hello")),
    ("prompt_completion", {"prompt": "Hi", "completion": "Hello", "label": True}, qa("Hi", "Hello")),
    (
        "alpaca",
        {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be brief."},
        qa("Hi", "Hello", "Be brief."),
    ),
    (
        "dolly",
        {"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "qa"},
        qa("Who?\n\nAnn did.", "Ann"),
    ),
    ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, qa("Hi", "Hello")),
    ("question_answer", {"id": 1, "question": "Hi", "answer": "Hello"}, qa("Hi", "Hello")),
    (
        "question_answer",
        {"question": "Who?", "answer": "Ann", "context": "Ann did.", "system": "Be brief."},
        qa("Who?\n\nAnn did.", "Ann", "Be brief."),
    ),
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
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        Conversation(
            [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
                {"role": "assistant", "content": "Hello"},
            ]
        ),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
        qa("Hi", "Hello", "S"),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "tools": "[]",
        },
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
    # A user's column may have the name of another column of the format.
    assert convert({"input": "Hi", "output": "Hello"}, columns={"instruction": "input"}) == qa("Hi", "Hello")


def test_system_is_a_default(convert: Convert) -> None:
    assert convert({"prompt": "Hi", "completion": "Hello"}, system="Be brief.") == qa("Hi", "Hello", "Be brief.")
    assert convert({"messages": qa("Hi", "Hello", "Theirs.").messages}, system="Be brief.") == qa(
        "Hi", "Hello", "Theirs."
    )


def test_sharegpt_calls_and_observations(convert: Convert) -> None:
    tool = {"name": "weather", "description": "Tells it.", "parameters": {}}
    conversations = [
        {"from": "human", "value": "Weather?"},
        {"from": "gpt", "value": "I look."},
        {
            "from": "function_call",
            "value": '[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "weather", "arguments": "{}"}]',
        },
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
                    {
                        "id": "call00000",
                        "type": "function",
                        "function": {"name": "weather", "arguments": {"city": "Oslo"}},
                    },
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


def test_calls_in_openais_older_form(convert: Convert) -> None:
    turns = [
        {"role": "user", "content": "Boil an egg."},
        {"role": "assistant", "content": None, "function_call": {"name": "boil", "arguments": '{"minutes": 5}'}},
        {"role": "function", "name": "boil", "content": "done"},
    ]
    call = {"id": "call00000", "type": "function", "function": {"name": "boil", "arguments": {"minutes": 5}}}
    found = convert({"messages": turns})
    assert isinstance(found, Conversation)
    assert found.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "call00000", "name": "boil"},
    ]


@pytest.mark.parametrize("flag", ["weight", "train", "training", "loss"])
def test_turns_that_are_not_learnt(convert: Convert, flag: str) -> None:
    def turns(learnt: object) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", flag: learnt}]}

    for learnt, weight in ((False, {"weight": 0}), (0.0, {"weight": 0}), (True, {}), (None, {})):
        found = convert(turns(learnt))
        assert (
            isinstance(found, Conversation) and found.messages[1] == {"role": "assistant", "content": "Hello"} | weight
        )
    with pytest.raises(DataError, match=f"turn 2 of 'conversations': {flag} is \"no\": must be 1"):
        convert(turns("no"))


def test_turns_of_two_kinds_in_one_column(convert: Convert) -> None:
    """JSON converted from tables has the keys of both in all turns."""
    turns = [
        {"from": "human", "value": "Hi", "role": None, "content": None},
        {"from": None, "value": None, "role": "assistant", "content": "Hello"},
    ]
    assert convert({"messages": turns}) == qa("Hi", "Hello")


def test_each_file_has_its_own_format(conf: Make) -> None:
    formatter = Formatter(conf(FILE).data, "conversations")
    assert formatter(Row("/a.json", 1, {"instruction": "Hi", "output": "Hello"})) == qa("Hi", "Hello")
    assert formatter(Row("/b.json", 1, {"prompt": "Hi", "completion": "Hello"})) == qa("Hi", "Hello")
    assert formatter.formats == ["alpaca", "prompt_completion"]
    with pytest.raises(
        DataError, match=r"/b\.json:2: format prompt_completion needs 'prompt', which is missing and 'completion'"
    ):
        formatter(Row("/b.json", 2, {"instruction": "Hi", "output": "Hello"}))


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "cannot detect the format: the row has no columns"),
    (
        {"title": "a", "body": "b"},
        r"cannot detect the format: the row has the columns title, body; known are .*alpaca \(instruction, output\).*data\.columns",
    ),
    ({"promt": "a", "completions": "b"}, "'promt' looks like 'prompt', 'completions' looks like 'completion'"),
    ({"text": "a"}, "plain text has no answers for tuning.objective sft: use objective pretrain"),
    ({"conversations": [], "chosen": {}, "rejected": {}}, r"preference pairs \(chosen, rejected\)"),
    ({"instruction": "a", "output": None}, "format alpaca needs 'output', which is null here"),
    ({"instruction": "a", "output": 42}, "'output' must be text, but is 42"),
    ({"instruction": " ", "output": "b"}, "'instruction' is empty"),
    (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        r"'history' must be a list of pairs \[question, answer\], but holds",
    ),
    ({"prompt": "a", "completion": "b", "label": False}, "'label' is false: its answer is marked as bad"),
    (
        {"prompt": "<image> What is it?", "completion": "b", "images": ["cat.png"]},
        r"a placeholder for images \(<image>\), but only text can be trained on",
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        r"turn 1 of 'messages': weight is 0.5: must be 1",
    ),
    ({"messages": []}, r"'messages' must be a list of turns, but is \[\]"),
    ({"messages": "[{"}, "'messages' is not JSON: .* at character"),
    ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, r"'messages': half of a surrogate pair \(\\ud83d\)"),
    ({"messages": "hello"}, "'messages' is not JSON"),
    ({"messages": ["hello"]}, "turn 1 of 'messages' must be an object, but is \"hello\""),
    (
        {"messages": [{"role": "asistant", "content": "a"}]},
        r"turn 1 of 'messages': role is \"asistant\"; known are system, .* \(nearest: assistant\)",
    ),
    ({"messages": [{"content": "a"}]}, "turn 1 of 'messages': role is null"),
    ({"messages": [{"role": "user"}]}, "turn 1 of 'messages': 'content' must be text, but is null"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"a part of 'content' must be text \({type: text, text: …}\), but is",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}]},
        "a part of 'content' must be text",
    ),
    ({"messages": [{"role": "user", "content": {"text": "a"}}]}, "'content' must be text"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        "a function call must be an object with name and arguments",
    ),
    ({"conversations": [{"from": "robot", "value": "a"}]}, 'from is "robot"; known are system, human'),
    ({"conversations": [{"from": "human", "value": None}]}, "'value' must be text, but is null"),
    ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "the function call is not JSON"),
    (
        {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}]},
        "the arguments of f must be an object",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": [b"x"]}}]}]},
        "turn 1 of 'messages': the arguments of f contain a value that JSON does not support: Object of type bytes",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": float("nan")}}]}]},
        "JSON does not support: Out of range",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": b"f"}]},
        "'tools' contain a value that JSON does not support",
    ),
    ({"conversations": [{"from": "human", "value": "a"}], "tools": "{"}, "'tools' is not JSON"),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"description": "d"}]},
        "'tools': a function must be an object with a name",
    ),
    ({"conversations": [{"from": "human", "value": "a"}], "tools": {"a": 1}}, "'tools' must be a list of functions"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_rows_name_file_and_line(convert: Convert, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        convert(values)
    assert str(error.value).startswith(f"{FILE}:7: ")


def test_pretrain_without_text(convert: Convert) -> None:
    with pytest.raises(
        DataError, match=r"pretrain needs a column 'text', the row has the columns body: .* e\.g\. \{text: body\}"
    ):
        convert({"body": "a"}, objective="pretrain")


def test_renamed_column_that_is_not_there(convert: Convert) -> None:
    with pytest.raises(
        DataError,
        match=r"no column 'question', which data\.columns maps to 'instruction'; the row has the columns frage",
    ):
        convert({"frage": "a"}, columns={"instruction": "question"})


def test_columns_with_an_unknown_name(conf: Make) -> None:
    with pytest.raises(ConfError, match=r"'instructions' is not a column of format alpaca; .*nearest: instruction"):
        Formatter(conf(FILE, format="alpaca", columns={"instructions": "question"}).data, "conversations")


# Columns that are not used --------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Boil an egg?"}, {"role": "assistant", "content": "Go away."}]
SHAPES: list[dict[str, Any]] = [
    {"prompt": "Boil an egg?", "completion": "Go away."},
    {"instruction": "Boil an egg?", "output": "Go away."},
    {"instruction": "Boil an egg?", "response": "Go away."},
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "Boil an egg?"}, {"from": "gpt", "value": "Go away."}]},
]


@pytest.mark.parametrize("values", SHAPES)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_examples_of_bad_answers_are_refused(convert: Convert, values: dict[str, Any], column: str) -> None:
    for bad in (False, "false", "False "):
        with pytest.raises(DataError, match=rf"'{column}' is .*: its answer is marked as bad"):
            convert({**values, column: bad})
    if "prompt" in values or column == "kto_tag":  # KTO's format, where labels have no other meaning
        for bad in (0, "0", -1, "Undesirable"):
            with pytest.raises(DataError, match=rf"'{column}' is .*: its answer is marked as bad"):
                convert({**values, column: bad})


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ({**SHAPES[0], "label": True}, set()),
        ({**SHAPES[0], "label": "true"}, set()),
        ({**SHAPES[0], "label": "positive"}, {"label"}),
        ({**SHAPES[0], "label": None, "id": None, "tags": [], "note": ""}, set()),
        ({**SHAPES[1], "label": 0, "id": 0, "system": "Be brief."}, {"label", "id"}),
        ({**SHAPES[3], "prompt": "Boil an egg?", "source": "web"}, {"prompt", "source"}),
        ({**SHAPES[2], "image": b"\xff", "category": "qa"}, {"image", "category"}),
        (
            {"messages": [TURNS[0] | {"name": "Ann", "images": ["a.png"]}, TURNS[1] | {"refusal": None}]},
            {"messages[].name", "messages[].images"},
        ),
        ({"messages": [TURNS[0] | {"function_call": "auto"}, TURNS[1] | {"weight": 1}]}, {"messages[].function_call"}),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi", "time": 3},
                    {"from": "gpt", "value": "Hello", "weight": 0},
                ]
            },
            {"conversations[].time"},
        ),
    ],
)
def test_what_is_not_used_of_a_row_is_counted(conf: Make, values: dict[str, Any], left_out: set[str]) -> None:
    formatter = Formatter(conf(FILE).data, "conversations")
    for line in (1, 2):
        formatter(Row(FILE, line, values))
    assert formatter.left_out == dict.fromkeys(left_out, 2)


def test_columns_named_in_the_conf_are_used(conf: Make) -> None:
    formatter = Formatter(conf(FILE, columns={"prompt": "question", "completion": "answer"}).data, "conversations")
    formatter(Row(FILE, 1, {"question": "Hi", "answer": "Hello", "prompt_id": 3}))
    assert formatter.left_out == {"prompt_id": 1}


def test_a_system_column_may_be_parts(convert: Convert) -> None:
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    found = convert({**SHAPES[0], "system": parts})
    assert isinstance(found, Conversation) and found.messages[0] == {"role": "system", "content": parts}
    with pytest.raises(DataError, match="'system' must be text, but is 3"):
        convert({**SHAPES[0], "system": 3})
