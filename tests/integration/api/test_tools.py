"""Tools: for a model whose chat template knows none they are told in words, and its answer is read by vLLM's parser."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ASK: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
    "tools": [TOOL],
    "temperature": 0,
    "max_tokens": 48,
}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_asked_for(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    calls: list[tuple[str | None, str, str]] = []
    if stream:
        chunks = list(client.chat.completions.create(**ASK, tool_choice=choice, stream=True))
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or [] if call.function]
        name = "".join(delta.function.name or "" for delta in deltas if delta.function)
        arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
        calls.append((next(delta.id for delta in deltas if delta.id), name, arguments))
        reason = chunks[-1].choices[0].finish_reason
    else:
        (answer,) = client.chat.completions.create(**ASK, tool_choice=choice).choices
        calls += [(call.id, call.function.name, call.function.arguments) for call in answer.message.tool_calls or []]
        reason = answer.finish_reason
    identity, name, arguments = calls[0]
    assert identity
    assert name == "get_weather"
    assert set(json.loads(arguments)) == {"city"}
    assert reason == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_model_decides_on(client: openai.OpenAI, stream: bool) -> None:
    """The small model never does of itself: its answer is held to one that calls."""
    ask = ASK | {"tool_choice": "auto", "extra_body": {"structured_outputs": {"choice": [CALL]}}}
    if stream:
        chunks = list(client.chat.completions.create(**ask, stream=True))
        deltas = [
            call.function for chunk in chunks for call in chunk.choices[0].delta.tool_calls or [] if call.function
        ]
        assert "".join(delta.name or "" for delta in deltas) == "get_weather"
        assert json.loads("".join(delta.arguments or "" for delta in deltas)) == {"city": "Oslo"}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        return
    (choice,) = client.chat.completions.create(**ask).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls] == [
        ("get_weather", {"city": "Oslo"})
    ]


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_an_answer_without_a_call(client: openai.OpenAI, choice: Any) -> None:
    ask = ASK | {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12}
    (answer,) = client.chat.completions.create(**ask, tool_choice=choice).choices
    assert answer.message.content
    assert not answer.message.tool_calls
    assert answer.finish_reason in ("stop", "length")


def test_the_tools_are_in_the_prompt_unless_none_are_to_be_used(client: openai.OpenAI, http: httpx.Client) -> None:
    def prompt_tokens(**change: Any) -> int:
        usage = client.chat.completions.create(**ASK | {"max_tokens": 1} | change).usage
        return usage.prompt_tokens if usage else 0

    bare = {key: value for key, value in ASK.items() if key != "tools"} | {"max_tokens": 1}
    without = client.chat.completions.create(**bare).usage
    assert without
    assert prompt_tokens(tool_choice="none") == without.prompt_tokens
    assert prompt_tokens(tool_choice="auto") > without.prompt_tokens + 50
    told = {"model": "small", "messages": ASK["messages"], "tools": [TOOL]}
    assert http.post("/tokenize", json=told).json()["count"] == prompt_tokens(tool_choice="auto")


def test_a_conversation_goes_on_with_what_a_tool_returned(client: openai.OpenAI, http: httpx.Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It rains in Oslo."},
    ]
    (answer,) = client.chat.completions.create(**ASK | {"messages": messages, "max_tokens": 16}).choices
    assert "rain" in (answer.message.content or "").lower()
    bare = client.chat.completions.create(model="small", messages=messages, max_tokens=4, temperature=0)
    assert bare.choices[0].message.content
    tokens = http.post("/tokenize", json={"model": "small", "messages": messages}).json()["tokens"]
    text = http.post("/detokenize", json={"model": "small", "tokens": tokens}).json()["prompt"]
    assert CALL in text
    assert "<tool_response>\nIt rains in Oslo.\n</tool_response>" in text
    assert "<tools>" not in text


def test_arguments_that_are_no_json_are_the_clients_mistake(http: httpx.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{broken"}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x"},
    ]
    assert http.post("/v1/chat/completions", json=ASK | {"messages": messages, "max_tokens": 2}).status_code in (
        200,
        400,
    )


def test_a_model_deployed_without_tools_says_so(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/chat/completions", json=ASK | {"model": "team/other", "tool_choice": "auto", "max_tokens": 2}
    )
    assert answer.status_code == 400
    assert "tool" in answer.json()["error"]["message"]
