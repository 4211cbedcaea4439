"""Tools told to a model whose template knows none, and requests brought into the form of training data."""

from __future__ import annotations

from typing import Any

from llm_ray.models.chat import as_learnt, tell_tools, text_of

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def test_parts_of_text_are_lines() -> None:
    assert text_of([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]) == "one\ntwo"
    assert text_of("one") == "one" and text_of(None) == "" and text_of([]) == ""


def test_the_tools_are_told_in_the_system_message() -> None:
    (system, user) = tell_tools([{"role": "user", "content": "Rain?"}], [TOOL])
    assert system["role"] == "system"
    assert (
        '<tools>\n{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}\n</tools>'
        in system["content"]
    )
    assert user == {"role": "user", "content": "Rain?"}
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True, "description": None}}
    assert tell_tools([{"role": "user", "content": "Rain?"}], [strict])[0] == system
    brief = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    (system, _) = tell_tools([{"role": "system", "content": brief}, {"role": "user", "content": "Rain?"}], [TOOL])
    assert system["content"].startswith("Be brief.\nBe kind.\n\n# Tools")


def test_calls_and_results_become_text() -> None:
    told = tell_tools(
        [
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALL, {**CALL, "function": {"name": "weather", "arguments": "{"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
        ],
        [],
    )
    assert told == [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>"},
    ]


def test_a_request_takes_the_form_of_training_data() -> None:
    turned = {"type": "function", "function": {"arguments": "{}", "name": "weather"}, "id": "1"}
    formed = as_learnt(
        [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [turned]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            {"role": "tool", "tool_call_id": "2", "content": "of no call"},
        ]
    )
    assert list(formed[1]["tool_calls"][0]) == ["id", "type", "function"]
    assert list(formed[1]["tool_calls"][0]["function"]) == ["name", "arguments"]
    assert formed[2]["name"] == "weather" and "name" not in formed[3]


def test_a_call_without_an_id_is_written_and_its_result_keeps_no_name() -> None:
    call = {"type": "function", "function": {"name": "weather"}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "rain"}]
    learnt = as_learnt(messages)
    assert learnt[0]["tool_calls"] == [call]
    assert learnt[1] == messages[1]
    assert [m["role"] for m in tell_tools(learnt, [])] == ["assistant", "user"]
