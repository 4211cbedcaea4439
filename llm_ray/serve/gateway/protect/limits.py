"""Limits of an API key: requests per minute, concurrent requests, tokens per answer. Not thread-safe: one gateway
counts in one event loop."""

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
    """Why a request is refused, and after how many seconds to retry."""

    message: str
    retry_after: int


class Limiter:
    """Counts each key's requests of the last minute and those in progress; without keys, everybody's together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}

    @contextlib.contextmanager
    def slot(self, who: str, limits: Limits) -> Iterator[Refusal | None]:
        """Counts a request of `who` while the block runs. Yields a Refusal, without counting, if it exceeds the limits,
        else None."""
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
        """Returns the remaining requests as headers of OpenAI's API:
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
    """Limits a request (vLLM's models for completions and chat) to answers of `cap` tokens; returns the error if it
    asks for more.

    Requests without max_tokens get this cap; `longest` is the model's maximum for prompt and answer together.
    """
    fields = type(body).model_fields
    values = {name: getattr(body, name) for name in ("max_tokens", "max_completion_tokens") if name in fields}
    asked = {
        name: value for name, value in values.items() if value not in (None, fields[name].default)
    }  # vLLM fills in defaults
    for name, value in asked.items():
        if value > cap:
            return f"{name} is {value}; the maximum is {cap}."
    if not asked:
        body.max_tokens = min(cap, longest, cap if body.max_tokens is None else body.max_tokens)
    return None
