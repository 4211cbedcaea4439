"""Bodies of requests: what is taken, what is refused, and how a client is told."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

from llm_ray.serve.gateway.errors import ApiError, invalid, refused
from llm_ray.serve.gateway.requests import (
    REFUSED,
    Chat,
    Completion,
    Detokenize,
    Embedding,
    Tokenize,
    TokenizeChat,
    TokenizeText,
)
from llm_ray.serve.gateway.simple import SimpleRequest

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def refusal(form: Any, body: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(form).validate_python(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors(include_url=False)]
    return invalid(errors, body)


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"messages": "hi"}, "messages", "a valid array"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": ["hi"]}, "messages[0]", "a valid object"),
        ({"messages": [{}]}, "messages[0]", "its role is missing"),
        (
            {"messages": [{"role": "boss", "content": "x"}]},
            "messages[0]",
            "its role is 'boss', which is not one of 'system'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "it is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a valid string or a valid array"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "it is missing",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0]", "its type is 'x'"),
        ({"temperature": "hot"}, "temperature", "a valid number"),
        ({"temperature": float("nan")}, "temperature", "a finite number"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"n": "3"}, "n", "a valid integer"),
        ({"n": True}, "n", "a valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 10**40}, "max_tokens", "less than or equal to"),
        ({"stop": 5}, "stop", "a valid string or a valid array"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"top_logprobs": 3}, "top_logprobs", "`logprobs` must be set"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "match pattern"),
        ({"tools": []}, "tools", "empty"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "it is missing"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "does not match",
        ),
        ({"tool_choice": "required"}, "tool_choice", "`tools` must be set"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "'json_schema' field"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "json_schema.schema is missing",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"grammar": "a", "json_object": True}}, "structured_outputs", "one of json, regex"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=True"),
    ],
)
def test_a_wrong_chat_is_told_by_field(change: dict[str, Any], param: str, said: str) -> None:
    error = refusal(Chat, {"messages": MESSAGES} | change)
    assert (error.status, error.param) == (400, param)
    assert error.message.startswith(f"{param}: ")
    assert said in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize("body", [[], None, "text", 5])
def test_a_body_that_is_no_object_is_told(body: Any) -> None:
    error = refusal(Chat, body)
    assert (error.message, error.param) == ("the body: it should be a valid object", None)


@pytest.mark.parametrize(
    ("form", "body", "param"),
    [
        (Completion, {}, "prompt"),
        (Completion, {"prompt": ""}, "prompt"),
        (Completion, {"prompt": []}, "prompt"),
        (Completion, {"prompt": [""]}, "prompt[0]"),
        (Completion, {"prompt": [1, "a"]}, "prompt[1]"),
        (Completion, {"prompt": ["a"] * 129}, "prompt"),
        (Completion, {"prompt": [-1]}, "prompt[0]"),
        (Completion, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (Embedding, {}, "input"),
        (Embedding, {"input": []}, "input"),
        (Tokenize, {}, "prompt"),
        (Tokenize, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (Detokenize, {"tokens": [2**40]}, "tokens[0]"),
        (Embedding, {"model": "m", "input": "a", "encoding_format": "bytes"}, "encoding_format"),
        (SimpleRequest, {}, "text"),
        (SimpleRequest, {"text": ""}, "text"),
        (SimpleRequest, {"text": [5]}, "text[0]"),
        (SimpleRequest, {"text": "a", "confg": {}}, "confg"),
        (SimpleRequest, {"text": "a", "config": {"max_tokens": 5}}, "config.max_tokens"),
        (SimpleRequest, {"text": [{"role": "user"}]}, "text[0].content"),
    ],
)
def test_other_wrong_bodies_are_told_by_field(form: Any, body: Any, param: str) -> None:
    assert refusal(form, body).param == param


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_the_engines_own_is_refused_with_a_reason(name: str) -> None:
    error = refusal(Chat, {"messages": MESSAGES, name: {"a": 1}})
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert REFUSED[name] in error.message
    assert name not in Chat.model_json_schema()["properties"]
    assert name not in Completion.model_json_schema()["properties"]
    Chat.model_validate({"messages": MESSAGES, name: None})


def test_what_asks_for_nothing_is_not_refused() -> None:
    Chat.model_validate(
        {"messages": MESSAGES, "priority": 0, "use_beam_search": False, "best_of": 1, "length_penalty": 1.0}
    )


def test_nothing_is_fetched_for_a_client() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
    error = refusal(Chat, {"messages": [{"role": "user", "content": [part]}]})
    assert error.param == "messages[0].content[0].image_url.url"
    part["image_url"] = {"url": "data:image/png;base64,AAAA"}
    Chat.model_validate({"messages": [{"role": "user", "content": [part]}]})


@pytest.mark.parametrize("form", [Chat, SimpleRequest])
def test_half_a_surrogate_pair_is_no_text(form: Any) -> None:
    assert "surrogate" in refusal(form, {"messages": [{"role": "user", "content": "\ud83d"}], "text": "\ud83d"}).message
    Chat.model_validate({"messages": [{"role": "user", "content": "\U0001f600"}]})


def test_what_openai_has_and_no_engine_knows_is_passed_over() -> None:
    body = Chat.model_validate(
        {"messages": MESSAGES, "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "user": "x"}
    )
    assert "metadata" not in body.model_dump()


def test_a_conversation_with_tools_travels_to_the_replica() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    body = {
        "messages": [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
    }
    chat = pickle.loads(pickle.dumps(Chat.model_validate(body)))  # noqa: S301
    assert chat.messages == body["messages"]
    assert chat.tools[0].function.name == "weather"


def test_tokenize_has_two_forms() -> None:
    form: TypeAdapter[Any] = TypeAdapter(Tokenize)
    assert type(form.validate_python({"prompt": "a"})) is TokenizeText
    assert type(form.validate_python({"messages": MESSAGES})) is TokenizeChat


def test_a_simple_request_becomes_one_of_openais_kind() -> None:
    asked = SimpleRequest.model_validate(
        {"text": "Hi", "config": {"max_new_tokens": 5, "do_sample": False, "top_k": 3}}
    )
    (chat,) = asked.bodies("m", chat=True)
    assert isinstance(chat, Chat)
    assert (chat.messages, chat.max_tokens, chat.temperature, chat.top_k) == (
        [{"role": "user", "content": "Hi"}],
        5,
        0.0,
        3,
    )
    (text,) = asked.bodies("m", chat=False)
    assert isinstance(text, Completion)
    assert text.prompt == "Hi"
    assert [
        body.messages[0]["content"]
        for body in SimpleRequest.model_validate({"text": ["a", "b"]}).bodies("m", chat=True)
    ] == ["a", "b"]
    assert SimpleRequest.model_validate({"text": MESSAGES}).is_conversation


def test_a_chat_with_a_model_without_a_template_is_told_what_to_do() -> None:
    said = "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template."
    told = refused(ErrorResponse(error=ErrorInfo(message=said, type="BadRequestError", code=400)))
    assert (told.status, told.param) == (400, "messages")
    assert "/v1/completions" in told.message
