"""What a client does wrong is told in OpenAI's form, with a status of its own making; never a traceback, never a
5xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def chat(**change: Any) -> dict[str, Any]:
    return {"model": "small", "messages": MESSAGES, "max_tokens": 2} | change


def text(**change: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "Hello", "max_tokens": 2} | change


def error(answer: httpx.Response) -> dict[str, Any]:
    """The error, when it is of OpenAI's form."""
    assert answer.headers["content-type"] == "application/json"
    told: dict[str, Any] = answer.json()["error"]
    assert answer.json() == {"error": told}
    assert set(told) == {"message", "type", "param", "code"}
    assert told["message"]
    assert "Traceback" not in told["message"]
    assert told["type"] in ("invalid_request_error", "authentication_error", "rate_limit_error", "server_error")
    return told


def part(**content: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": [content]}])


ODD_TYPE = "response_format.json_schema.schema.type"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        # names
        (CHAT, chat(model="nobody"), 404, "model", "model_not_found"),
        (CHAT, chat(model=""), 404, "model", "model_not_found"),
        (CHAT, {"messages": MESSAGES}, 400, "model", "model_missing"),
        (TEXT, text(model="smal"), 404, "model", "model_not_found"),
        ("/nobody", {"text": "Hi"}, 404, "model", "model_not_found"),
        ("/nobody", {}, 404, "model", "model_not_found"),
        # prompts
        (CHAT, chat(messages=[]), 400, "messages", "invalid_request"),
        (CHAT, chat(messages=[{"role": "boss", "content": "x"}]), 400, "messages[0]", "invalid_request"),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": "word " * 600}]),
            400,
            "input_tokens",
            "context_length_exceeded",
        ),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": "word " * 600}], stream=True),
            400,
            "input_tokens",
            "context_length_exceeded",
        ),
        (TEXT, text(prompt="word " * 600), 400, "input_tokens", "context_length_exceeded"),
        (TEXT, text(prompt=""), 400, "prompt", "invalid_request"),
        (TEXT, text(prompt=[]), 400, "prompt", "invalid_request"),
        (TEXT, text(prompt=[99_999_999]), 400, None, "invalid_request"),
        (
            CHAT,
            part(type="image_url", image_url={"url": "http://127.0.0.1/x.png"}),
            400,
            "messages[0].content[0].image_url.url",
            None,
        ),
        (CHAT, part(type="image_url", image_url={"url": PIXEL}), 400, None, "invalid_request"),
        ("/small", {"text": ""}, 400, "text", "invalid_request"),
        ("/small", {"text": "x", "config": {"max_new_token": 3}}, 400, "config.max_new_token", "invalid_request"),
        ("/small", {"text": ["a", "b"], "stream": True}, 400, "stream", "invalid_request"),
        # settings
        (CHAT, chat(max_tokens=100_000), 400, "max_tokens", "invalid_request"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens", "invalid_request"),
        (CHAT, chat(temperature=-1), 400, "temperature", "invalid_request"),
        (CHAT, chat(temperature="hot"), 400, "temperature", "invalid_request"),
        (CHAT, chat(logit_bias={"999999": 1}), 400, "logit_bias", "invalid_request"),
        (CHAT, chat(min_tokens=9), 400, None, "invalid_request"),
        (
            CHAT,
            chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}),
            400,
            ODD_TYPE,
            None,
        ),
        (
            CHAT,
            chat(
                stream=True,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}},
            ),
            400,
            ODD_TYPE,
            None,
        ),
        (CHAT, chat(structured_outputs={"regex": "("}), 400, None, "invalid_request"),
        (CHAT, chat(tools=[]), 400, "tools", "invalid_request"),
        (TEXT, text(suffix="x"), 400, "suffix", "invalid_request"),
        # what costs too much, and what is the engine's own
        (CHAT, chat(n=33), 400, "n", "too_many_answers"),
        (TEXT, text(prompt=["a"] * 20, n=2), 400, "prompt", "too_many_answers"),
        (TEXT, text(model="team/other", prompt=["a"] * 5), 400, "prompt", "too_many_answers"),
        ("/team/other", {"text": ["a"] * 5}, 400, "text", "too_many_answers"),
        (CHAT, chat(top_logprobs=21, logprobs=True), 400, "top_logprobs", "invalid_request"),
        (CHAT, chat(stop=["a"] * 5), 400, "stop", "invalid_request"),
        (CHAT, chat(use_beam_search=True), 400, "use_beam_search", "unsupported_parameter"),
        (
            CHAT,
            chat(kv_transfer_params={"do_remote_prefill": True}),
            400,
            "kv_transfer_params",
            "unsupported_parameter",
        ),
        (CHAT, chat(chat_template="{{ messages }}"), 400, "chat_template", "unsupported_parameter"),
        (CHAT, chat(chat_template_kwargs={"chat_template": "{{ messages }}"}), 400, None, "invalid_request"),
        (TEXT, text(prompt_embeds="AAAA"), 400, "prompt_embeds", "unsupported_parameter"),
        (TEXT, text(best_of=3), 400, "best_of", "unsupported_parameter"),
        # other routes
        ("/v1/embeddings", {"model": "small", "input": "x"}, 400, None, "invalid_request"),
        ("/v1/embeddings", {"model": "small"}, 400, "input", "invalid_request"),
        ("/tokenize", {"model": "small"}, 400, "prompt", "invalid_request"),
        ("/detokenize", {"model": "small", "tokens": [2**40]}, 400, "tokens[0]", "invalid_request"),
        ("/v1/nothing", {}, 404, None, "not_found"),
        ("/", {}, 404, None, "not_found"),
    ],
)
def test_a_wrong_request(
    http: httpx.Client, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    answer = http.post(path, json=body)
    told = error(answer)
    assert (answer.status_code, told["param"], told["type"]) == (status, param, "invalid_request_error")
    assert code is None or told["code"] == code


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("", 400, "invalid_request"),
        ("null", 400, "invalid_request"),
        ("[]", 400, "invalid_request"),
        ('"text"', 400, "invalid_request"),
        ("{bad", 400, "invalid_json"),
        (
            '{"model": "small", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            400,
            "invalid_request",
        ),
        ('{"model": "small", "messages": [{"role": "user", "content": "\\ud83d"}]}', 400, "invalid_request"),
        ('{"model": "\\ud83d", "messages": []}', 400, "invalid_request"),
        ('{"max_tokens": ' + "9" * 5000 + "}", 400, None),
        ("[" * 100_000, 400, None),
        (b"\xff\xfe{}", 400, None),
        ("x" * (2**20 + 1), 413, "body_too_large"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/small"])
def test_a_body_that_cannot_be_read(
    http: httpx.Client, path: str, body: str | bytes, status: int, code: str | None
) -> None:
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    told = error(answer)
    assert answer.status_code == status
    assert code is None or told["code"] == code


def test_a_body_of_another_kind(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = http.post(CHAT, content=json.dumps(chat()), headers={"Content-Type": kind})
        assert (answer.status_code, error(answer)["code"]) == (415, "unsupported_media_type")
    assert (
        http.post(
            CHAT, content=json.dumps(chat()), headers={"Content-Type": "application/json; charset=utf-8"}
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models/small", 405),
        ("POST", "/health", 405),
        ("OPTIONS", CHAT, 405),
        ("OPTIONS", "/health", 405),
        ("TRACE", "/metrics", 405),
        ("GET", "/small", 405),
        ("GET", "/nobody", 404),
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/docs", 404),
        ("GET", "/%ff%00", 404),
        ("POST", "/a/b/c", 404),
    ],
)
def test_a_wrong_method_or_path(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    error(answer)
    assert (status == 405) == ("allow" in answer.headers)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/small"])
def test_head_answers_as_get_without_a_body(http: httpx.Client, path: str) -> None:
    there, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (there.status_code, b"")
    assert head.headers["content-type"] == there.headers["content-type"]
    assert http.head("/v1/models/nobody").status_code == 404


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**chat(temperature=9))
    assert wrong.value.param == "temperature"


def test_headers_of_a_client_do_not_reach_the_engine(http: httpx.Client) -> None:
    """Two requests of one id do not meet, and nobody is served before others."""
    headers = {"X-Request-Id": "same", "X-Data-Parallel-Rank": "7", "X-Session-Id": "a", "X-Priority": "-5"}
    bodies = [text(prompt=f"{word} is", max_tokens=6, temperature=0) for word in ("Ice", "Fire")]
    with (
        httpx.Client(base_url=http.base_url, trust_env=False, timeout=60) as other,
        other.stream("POST", TEXT, json=bodies[0] | {"stream": True}, headers=headers) as first,
    ):
        assert http.post(TEXT, json=bodies[1], headers=headers).status_code == 200
        first.read()
        assert first.text.endswith("data: [DONE]\n\n")


def test_a_request_that_asks_for_much_does_not_hold_up_others(http: httpx.Client) -> None:
    """A text far too long is refused before it is worked on, and the most that may be asked for is answered."""
    assert http.post(CHAT, json=chat(messages=[{"role": "user", "content": "a b " * 2**17}])).status_code == 400
    much = text(
        n=32, temperature=1, logprobs=20, stop=["zzzz"] * 4, bad_words=[f"word{i}" for i in range(50)], max_tokens=2
    )
    answer = http.post(TEXT, json=much)
    assert answer.status_code == 200
    assert len(answer.json()["choices"]) == 32
