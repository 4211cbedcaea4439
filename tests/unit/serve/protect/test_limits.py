"""Limits of a key, by a clock of the test's own."""

from __future__ import annotations

from llm_ray.conf.serve import Limits
from llm_ray.serve.protect.limits import Limiter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_of_a_minute_are_counted() -> None:
    clock = Clock()
    limiter, limits = Limiter(clock), Limits(requests_per_minute=2)
    for _ in range(2):
        assert limiter.take("a", limits) is None
        clock.now += 10
    refused = limiter.take("a", limits)
    assert refused
    assert refused.retry_after == 40
    assert limiter.take("b", limits) is None
    clock.now += 40
    assert limiter.take("a", limits) is None
    assert limiter.take("a", limits) is not None


def test_what_was_refused_is_not_counted() -> None:
    clock = Clock()
    limiter, limits = Limiter(clock), Limits(requests_per_minute=1)
    assert limiter.take("a", limits) is None
    for _ in range(5):
        assert limiter.take("a", limits)
    clock.now += 60
    assert limiter.take("a", limits) is None


def test_requests_at_the_same_time_are_counted_and_given_back() -> None:
    limiter, limits = Limiter(), Limits(concurrent=1)
    assert limiter.take("a", limits) is None
    refused = limiter.take("a", limits)
    assert refused
    assert refused.retry_after == 1
    limiter.release("a")
    assert limiter.take("a", limits) is None


def test_without_limits_everything_goes() -> None:
    limiter = Limiter()
    assert all(limiter.take("a", Limits()) is None for _ in range(1000))


def test_what_is_left_is_told() -> None:
    limiter, limits = Limiter(), Limits(requests_per_minute=3)
    limiter.take("a", limits)
    assert dict(limiter.headers("a", limits)) == {b"x-ratelimit-limit-requests": b"3", b"x-ratelimit-remaining-requests": b"2"}
    assert limiter.headers("a", Limits()) == []
