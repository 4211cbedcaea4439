"""What is answered: whole and streamed, the settings of an answer, its form, what it took."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import openai
import pytest

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
DAYS: dict[str, Any] = {
    "model": "small",
    "prompt": "The days of the week are Monday,",
    "max_tokens": 12,
    "temperature": 0,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
LETTERS = "Ünïcödé 🦦👩‍🚀 北京"


def chat(**change: Any) -> dict[str, Any]:
    return {"model": "small", "messages": QUESTION, "temperature": 0, "max_tokens": 16} | change


def texts(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_an_answer_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**chat())
    assert (whole.choices[0].message.content, whole.choices[0].message.role) == (ANSWER, "assistant")
    assert (whole.choices[0].finish_reason, whole.model, whole.object) == ("stop", "small", "chat.completion")
    chunks = list(client.chat.completions.create(**chat(stream=True)))
    assert texts(chunks) == ANSWER
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"


def test_usage_is_exact(client: openai.OpenAI, http: httpx.Client) -> None:
    whole = client.chat.completions.create(**chat()).usage
    assert whole is not None
    assert whole.prompt_tokens == http.post("/tokenize", json={"model": "small", "messages": QUESTION}).json()["count"]
    assert (
        whole.completion_tokens == http.post("/tokenize", json={"model": "small", "prompt": ANSWER}).json()["count"] + 1
    )  # its end
    assert whole.total_tokens == whole.prompt_tokens + whole.completion_tokens
    *before, last = client.chat.completions.create(**chat(stream=True, stream_options={"include_usage": True}))
    assert last.choices == []
    assert last.usage == whole
    assert all(chunk.usage is None for chunk in before)
    assert all(chunk.usage is None and chunk.choices for chunk in client.chat.completions.create(**chat(stream=True)))
    several = client.completions.create(
        **DAYS | {"prompt": ["One", "One two three"], "max_tokens": 3, "n": 2, "temperature": 1}
    )
    assert several.usage
    assert several.usage.completion_tokens <= 12
    (*_, end) = client.completions.create(
        **DAYS | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
    )
    assert end.usage
    assert end.usage.completion_tokens == 5


def test_the_end_of_a_stream_is_told(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_32_at_once_answer_as_one_alone(base: str, client: openai.OpenAI) -> None:
    ask = [DAYS | {"prompt": f"The number after {i} is", "max_tokens": 8} for i in range(16)]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{base}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as asking:

            async def streamed(one: dict[str, Any]) -> str:
                return "".join(
                    [chunk.choices[0].text async for chunk in await asking.completions.create(**one, stream=True)]
                )

            async def whole(one: dict[str, Any]) -> str:
                return (await asking.completions.create(**one)).choices[0].text

            return await asyncio.gather(*(whole(one) for one in ask), *(streamed(one) for one in ask))

    answers = asyncio.run(together())
    assert answers[:16] == answers[16:]
    assert len(set(answers)) > 8
    assert answers[7] == client.completions.create(**ask[7]).choices[0].text


def test_an_answer_ends_where_it_is_told_to(client: openai.OpenAI) -> None:
    plain = client.completions.create(**DAYS).choices[0]
    assert plain.finish_reason == "length"
    stop = plain.text.split()[2]
    for asked in (stop, ["Xyz", stop]):
        stopped = client.completions.create(**DAYS, stop=asked).choices[0]
        assert (stopped.text, stopped.finish_reason) == (plain.text[: plain.text.index(stop)], "stop")
        chunks = list(client.completions.create(**DAYS, stop=asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == stopped.text
        assert chunks[-1].choices[0].finish_reason == "stop"
    shorter = client.chat.completions.create(**chat(max_tokens=None, max_completion_tokens=3))
    assert (shorter.choices[0].finish_reason, shorter.usage and shorter.usage.completion_tokens) == ("length", 3)


def test_a_seed_decides_and_several_answers_differ(client: openai.OpenAI) -> None:
    ask = DAYS | {"temperature": 1.5, "n": 3, "seed": 4}
    several = [choice.text for choice in client.completions.create(**ask).choices]
    assert len(set(several)) > 1
    assert [choice.text for choice in client.completions.create(**ask).choices] == several
    assert [choice.text for choice in client.completions.create(**ask | {"seed": 5}).choices] != several
    streamed = ["", "", ""]
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == several


def test_logprobs(client: openai.OpenAI) -> None:
    scored = client.chat.completions.create(**chat(logprobs=True, top_logprobs=20)).choices[0]
    assert scored.logprobs
    tokens = scored.logprobs.content or []
    assert b"".join(bytes(token.bytes or []) for token in tokens).startswith(ANSWER.encode())
    for token in tokens:
        best = token.top_logprobs[0]
        assert (best.token, best.logprob) == (token.token, token.logprob)
        assert 0.1 < sum(math.exp(one.logprob) for one in token.top_logprobs) <= 1.001
    streamed = [
        token
        for chunk in client.chat.completions.create(**chat(logprobs=True, top_logprobs=20, stream=True))
        for token in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    bare = client.chat.completions.create(**chat(logprobs=True, max_tokens=1)).choices[0].logprobs
    assert bare and bare.content and bare.content[0].top_logprobs == []
    assert client.chat.completions.create(**chat(max_tokens=1)).choices[0].logprobs is None


def test_several_prompts_texts_and_tokens(client: openai.OpenAI, http: httpx.Client) -> None:
    prompts = ["One two", "The capital of France is"]
    ask = DAYS | {"max_tokens": 4}
    together = client.completions.create(**ask | {"prompt": prompts}).choices
    assert [choice.index for choice in together] == [0, 1]
    alone = [client.completions.create(**ask | {"prompt": prompt}).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together] == alone
    tokens = [http.post("/tokenize", json={"model": "small", "prompt": prompt}).json()["tokens"] for prompt in prompts]
    assert [choice.text for choice in client.completions.create(**ask | {"prompt": tokens}).choices] == alone
    assert client.completions.create(**ask | {"prompt": tokens[0]}).choices[0].text == alone[0]


def test_the_prompt_comes_back_with_echo(client: openai.OpenAI) -> None:
    ask = DAYS | {"prompt": "One two", "echo": True}
    assert client.completions.create(**ask | {"max_tokens": 2}).choices[0].text.startswith("One two")
    scored = client.completions.create(**ask | {"max_tokens": 0, "logprobs": 1}).choices[0]
    assert (scored.text, scored.logprobs and scored.logprobs.tokens) == ("One two", ["One", " two"])
    assert scored.logprobs and scored.logprobs.token_logprobs and scored.logprobs.token_logprobs[1] < 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_the_form_of_a_schema(client: openai.OpenAI, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    ask = chat(max_tokens=60, response_format=form)
    said = (
        texts(client.chat.completions.create(**ask, stream=True))
        if stream
        else client.chat.completions.create(**ask).choices[0].message.content
    )
    told = json.loads(said or "")
    assert set(told) == {"city", "people"}
    assert 1 <= told["people"] <= 99


def test_an_answer_in_json_of_a_form_or_of_a_choice(client: openai.OpenAI) -> None:
    said = (
        client.chat.completions.create(**chat(max_tokens=8, response_format={"type": "json_object"}))
        .choices[0]
        .message.content
    )
    assert (said or "").lstrip().startswith("{")
    for form, allowed in (({"choice": ["Rome", "Oslo"]}, ("Rome", "Oslo")), ({"regex": "[ab]-1"}, ("a-1", "b-1"))):
        answer = client.chat.completions.create(**chat(extra_body={"structured_outputs": form}))
        assert answer.choices[0].message.content in allowed
    plain = client.chat.completions.create(**chat(response_format={"type": "text"}))
    assert plain.choices[0].message.content == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_letters_of_several_tokens_come_whole(client: openai.OpenAI, stream: bool) -> None:
    ask = chat(
        max_tokens=64,
        messages=[{"role": "user", "content": LETTERS}],
        extra_body={"structured_outputs": {"choice": [LETTERS]}},
    )
    if stream:
        pieces = [
            c.choices[0].delta.content or "" for c in client.chat.completions.create(**ask, stream=True) if c.choices
        ]
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) == LETTERS
    else:
        assert client.chat.completions.create(**ask).choices[0].message.content == LETTERS
    echoed = client.completions.create(**DAYS | {"prompt": LETTERS, "echo": True, "max_tokens": 1}).choices[0].text
    assert echoed.startswith(LETTERS)


def test_messages_of_every_kind(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    answer = client.chat.completions.create(**chat(messages=[{"role": "user", "content": parts}]))
    assert "Paris" in (answer.choices[0].message.content or "")
    history = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is the capital of Italy?", "name": "Ada"},
        {"role": "assistant", "content": "Rome."},
        *QUESTION,
    ]
    assert "Paris" in (client.chat.completions.create(**chat(messages=history)).choices[0].message.content or "")
    assert (
        client.chat.completions.create(**chat(messages=[{"role": "user", "content": ""}], max_tokens=2))
        .choices[0]
        .message.content
    )
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    more = client.chat.completions.create(
        **chat(messages=begun, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    )
    assert (more.choices[0].message.content or "").startswith(" Paris")


def test_other_settings_are_heeded(client: openai.OpenAI) -> None:
    def said(**change: Any) -> str:
        return client.completions.create(**DAYS | change).choices[0].text

    plain = said()
    word = plain.split()[0].strip(",")
    assert word not in said(extra_body={"bad_words": [word]})
    assert said(logit_bias={"28": 100}, max_tokens=3) == ",,,"
    assert said(temperature=1, top_p=1e-9) == plain
    assert said(temperature=1, extra_body={"top_k": 1}) == plain
    assert said(frequency_penalty=2, presence_penalty=2) != plain
    assert said(extra_body={"ignore_eos": True, "min_tokens": 12}) == plain


def test_what_openai_has_and_no_engine_knows_is_passed_over(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**chat(user="ada", metadata={"a": "b"}, store=False, service_tier="auto"))
    assert answer.choices[0].message.content == ANSWER
