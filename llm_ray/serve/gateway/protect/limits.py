"""Limits of an API key: requests per minute, concurrent requests, tokens per answer. One gateway counts, in one event
loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_ray.conf.serve import Limits

_MINUTE = 60.0


@dataclass
class _Usage:
    times: deque[float] = field(default_factory=deque)
    running: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why a request is not taken, and after how many seconds it is worth trying again."""

    message: str
    retry_after: int


class Limiter:
    """What each key (or, without keys, everybody) has asked within the last minute, and is asking."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}

    @contextlib.contextmanager
    def slot(self, who: str, limits: Limits) -> Iterator[Refusal | None]:
        """Count a request of `who` as long as the block lasts, however it ends; one over the limits is refused, and not
        counted."""
        usage = self._usage.setdefault(who, _Usage())
        refusal = self._refusal(usage, limits)
        if refusal:
            yield refusal
            return
        usage.times.append(self._clock())
        usage.running += 1
        try:
            yield None
        finally:
            usage.running -= 1

    def _refusal(self, usage: _Usage, limits: Limits) -> Refusal | None:
        now = self._clock()
        while usage.times and usage.times[0] <= now - _MINUTE:
            usage.times.popleft()
        if limits.concurrent is not None and usage.running >= limits.concurrent:
            return Refusal(f"Rate limit reached: {limits.concurrent} concurrent requests.", 1)
        if limits.requests_per_minute is not None and len(usage.times) >= limits.requests_per_minute:
            wait = usage.times[-limits.requests_per_minute] + _MINUTE - now
            return Refusal(
                f"Rate limit reached: {limits.requests_per_minute} requests per minute.", max(1, math.ceil(wait))
            )
        return None

    def headers(self, who: str, limits: Limits) -> dict[str, str]:
        """What is left, as OpenAI's API tells it:
        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""
        if limits.requests_per_minute is None:
            return {}
        times = self._usage[who].times
        full_again = times[-1] + _MINUTE - self._clock() if times else 0.0
        return {
            "x-ratelimit-limit-requests": str(limits.requests_per_minute),
            "x-ratelimit-remaining-requests": str(max(0, limits.requests_per_minute - len(times))),
            "x-ratelimit-reset-requests": f"{max(0, math.ceil(full_again))}s",
        }


def cap_tokens(body: Any, cap: int, longest: int) -> str | None:
    """Hold a request (of vLLM's models for completions and chat) to answers of `cap` tokens; returns why one that asks
    for more is refused.

    Who asks for no number gets so many at most; `longest` is what the model can do, prompt and answer together.
    """
    fields = type(body).model_fields
    values = {name: getattr(body, name) for name in ("max_tokens", "max_completion_tokens") if name in fields}
    asked = {
        name: value for name, value in values.items() if value not in (None, fields[name].default)
    }  # vLLM fills defaults in
    for name, value in asked.items():
        if value > cap:
            return f"{name} is {value}; the maximum is {cap}."
    if not asked:
        body.max_tokens = min(cap, longest, cap if body.max_tokens is None else body.max_tokens)
    return None
