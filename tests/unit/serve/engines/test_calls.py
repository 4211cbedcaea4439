"""Calls in an answer that is cut anywhere: the same whole and streamed, and finished ones kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.entrypoints.generate.base.protocol import UsageInfo
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
)
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser import ParserManager

from llm_ray.serve.engines.calls import _answer, as_streamed
from llm_ray.serve.gateway.requests import Chat

TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    for name in ("weather", "time")
]
TEXTS = {
    "hermes": 'Well.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Malmö", "in": {"days": '
    "2}}}\n</tool_call>\n"
    '<tool_call>\n{"name": "time", "arguments": {"city": "}\\"{"}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "time", "parameters": {"city": '
    '"Rome"}}',
    "pythonic": "[weather(city='Oslo'), time(city='Rome')]",
    "granite4": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>{"name": "time", "arguments": {"city": "Rome"}}</tool_call>',
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(["<|python_tag|>"])  # which Llama's parser looks for
    return tokenizer


def request(choice: Any) -> Chat:
    return Chat.model_validate(
        {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "tool_choice": choice, "max_tokens": 9}
    )


def whole_and_streamed(parser: Any, tokenizer: Any, asked: Chat, tokens: list[int]) -> list[Any]:
    text = tokenizer.decode(tokens)
    reasoning, content, calls = as_streamed(parser)(tokenizer, asked.tools).parse(
        text, asked, enable_auto_tools=True, model_output_token_ids=tokens
    )
    assert reasoning is None
    streamed: dict[int, list[str]] = {}
    said, at = "", 0
    stream = parser(tokenizer, asked.tools)
    for number in range(1, len(tokens) + 1):
        so_far = tokenizer.decode(tokens[:number])
        so_far = text if number == len(tokens) else so_far.removesuffix("\ufffd")
        delta = stream.parse_delta(so_far[at:], [tokens[number - 1]], asked, [1], finished=number == len(tokens))
        at = len(so_far)
        for call in (delta and delta.tool_calls) or ():
            name, arguments = (call.function.name or "", call.function.arguments or "") if call.function else ("", "")
            streamed.setdefault(call.index, ["", ""])
            streamed[call.index][0] += name
            streamed[call.index][1] += arguments
        said += (delta and delta.content) or ""
    return [(content or "", [[call.name, call.arguments] for call in calls or ()]), (said, [*streamed.values()])]


@pytest.mark.parametrize("form", TEXTS)
def test_an_answer_cut_anywhere_is_the_same_whole_and_streamed(tokenizer: Any, form: str) -> None:
    parser = ParserManager.get_parser(tool_parser_name=form, enable_auto_tools=True)
    tokens = tokenizer.encode(TEXTS[form])
    most = 0
    for choice in ("auto", "required"):
        asked = request(choice)
        for cut in range(1, len(tokens) + 1):
            whole, streamed = whole_and_streamed(parser, tokenizer, asked, tokens[:cut])
            assert whole == streamed, (choice, tokenizer.decode(tokens[:cut]))
            finished = [name for name, arguments in whole[1] if _is_json(arguments)]
            assert finished == ["weather", "time"][: len(finished)]
            most = max(most, len(finished))
            if form == "hermes" and cut == len(tokens) - 3:
                assert [name for name, _ in whole[1]] == ["weather", "time"]
                assert json.loads(whole[1][0][1]) == {"city": "Malmö", "in": {"days": 2}}
    assert most == 2


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("reason", "told"), [("length", "length"), ("stop", "tool_calls")])
def test_the_reason_of_the_end_is_that_of_a_stream(reason: str, told: str, named: bool) -> None:
    async def results() -> AsyncIterator[RequestOutput]:
        yield RequestOutput(
            "r", None, [1], None, [CompletionOutput(0, "", [5], None, None, finish_reason=reason)], True
        )

    call = {"function": {"name": "weather", "arguments": "{"}}

    async def answer(_: Any, generator: Any) -> Any:
        async for _result in generator:
            pass
        message = ChatMessage(role="assistant", tool_calls=[call])
        choice = ChatCompletionResponseChoice(index=0, message=message, finish_reason="tool_calls")
        return ChatCompletionResponse(model="m", choices=[choice], usage=UsageInfo())

    asked = request({"type": "function", "function": {"name": "weather"}} if named else "auto")
    response = asyncio.run(_answer(answer, asked, results()))
    assert response.choices[0].finish_reason == ("stop" if named and reason == "stop" else told)
