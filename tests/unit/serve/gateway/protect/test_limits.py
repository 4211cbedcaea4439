"""Limits of a key, by a clock of the test's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.conf.serve import Limits
from llm_ray.serve.gateway.protect.limits import Limiter, cap_tokens


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ask(limiter: Limiter, limits: Limits, who: str = "a") -> int:
    """A request that ends at once: 0, or the seconds to wait."""
    with limiter.slot(who, limits) as refusal:
        return refusal.retry_after if refusal else 0


def test_requests_of_a_minute_are_counted() -> None:
    clock = Clock()
    limiter, limits = Limiter(clock), Limits(requests_per_minute=2)
    for _ in range(2):
        assert ask(limiter, limits) == 0
        clock.now += 10
    assert ask(limiter, limits) == 40
    assert ask(limiter, limits, "b") == 0
    clock.now += 40
    assert ask(limiter, limits) == 0
    assert ask(limiter, limits) == 10


def test_what_was_refused_is_not_counted() -> None:
    clock = Clock()
    limiter, limits = Limiter(clock), Limits(requests_per_minute=1)
    assert ask(limiter, limits) == 0
    assert [ask(limiter, limits) for _ in range(5)] == [60] * 5
    clock.now += 60
    assert ask(limiter, limits) == 0


@given(st.integers(1, 5), st.lists(st.integers(0, 160), max_size=60))
def test_no_minute_has_more_requests_than_it_may_and_who_waits_as_told_is_let_in(
    most: int, quarters: list[int]
) -> None:
    clock = Clock()
    limiter, limits, taken = Limiter(clock), Limits(requests_per_minute=most), []
    for quarter in quarters:
        clock.now += quarter / 4  # seconds
        if wait := ask(limiter, limits):
            clock.now += wait
            assert ask(limiter, limits) == 0
        taken.append(clock.now)
    assert all(later - earlier >= 60 for earlier, later in zip(taken, taken[most:], strict=False))


@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_requests_at_the_same_time_are_counted_and_given_back_however_they_end(end: type[BaseException] | None) -> None:
    limiter, limits = Limiter(), Limits(concurrent=1)
    with contextlib.suppress(BaseException), limiter.slot("a", limits) as refusal:
        assert refusal is None
        with limiter.slot("a", limits) as second:
            assert second
            assert second.retry_after == 1
        assert ask(limiter, limits) == 1, "what was refused gives back nothing"
        assert ask(limiter, limits, "b") == 0
        if end:
            raise end
    assert ask(limiter, limits) == 0


def test_without_limits_everything_goes() -> None:
    limiter = Limiter()
    with contextlib.ExitStack() as stack:
        assert not any(stack.enter_context(limiter.slot("a", Limits())) for _ in range(1000))


def test_what_is_left_is_told() -> None:
    clock = Clock()
    limiter, limits = Limiter(clock), Limits(requests_per_minute=3)
    ask(limiter, limits)
    clock.now += 10
    assert limiter.headers("a", limits) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "50s",
    }
    assert limiter.headers("a", Limits()) == {}


def chat(**asked: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "Hello"}], **asked)


def completion(**asked: Any) -> Any:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest(model="m", prompt="Hello", **asked)


@pytest.mark.parametrize(
    ("kind", "asked", "got"),
    [
        (chat, {}, 100),
        (chat, {"max_tokens": None}, 100),
        (chat, {"max_tokens": 100}, 100),
        (chat, {"max_tokens": 101}, "max_tokens is 101; the maximum is 100"),
        (chat, {"max_completion_tokens": 100}, None),
        (chat, {"max_completion_tokens": 101}, "max_completion_tokens is 101; the maximum is 100"),
        (chat, {"max_completion_tokens": 5, "max_tokens": 101}, "max_tokens is 101; the maximum is 100"),
        (completion, {}, 16),
        (completion, {"max_tokens": None}, 16),
        (completion, {"max_tokens": 101}, "max_tokens is 101; the maximum is 100"),
        (completion, {"max_completion_tokens": 5, "max_tokens": 101}, "max_tokens is 101; the maximum is 100"),
        (completion, {"max_completion_tokens": "many"}, 16),
    ],
)
def test_answers_are_held_to_the_keys_tokens(kind: Callable[..., Any], asked: dict[str, Any], got: object) -> None:
    body = kind(**asked)
    refusal = cap_tokens(body, 100, longest=2048)
    assert refusal.startswith(got) if isinstance(got, str) and refusal else body.max_tokens == got, (refusal, body)


def test_the_default_is_no_more_than_the_model_can() -> None:
    body = chat()
    assert cap_tokens(body, 10_000, longest=2048) is None
    assert body.max_tokens == 2048
    short = completion()
    assert cap_tokens(short, 8, longest=2048) is None
    assert short.max_tokens == 8
