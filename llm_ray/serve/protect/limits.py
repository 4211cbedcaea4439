"""Limits of an API key: requests a minute, requests at the same time. One gateway counts for all, in one event loop."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

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

    def take(self, who: str, limits: Limits) -> Refusal | None:
        """Count a request of `who`, unless it is over the limits; what is taken has to be given back with `release`."""
        usage = self._usage.setdefault(who, _Usage())
        now = self._clock()
        while usage.times and usage.times[0] <= now - _MINUTE:
            usage.times.popleft()
        if limits.concurrent is not None and usage.running >= limits.concurrent:
            return Refusal(f"{usage.running} requests of this key are in progress, as many as it may have.", 1)
        if limits.requests_per_minute is not None and len(usage.times) >= limits.requests_per_minute:
            wait = usage.times[-limits.requests_per_minute] + _MINUTE - now
            return Refusal(f"This key may ask {limits.requests_per_minute} times a minute.", max(1, math.ceil(wait)))
        usage.times.append(now)
        usage.running += 1
        return None

    def release(self, who: str) -> None:
        """The request has ended, however it did."""
        self._usage[who].running -= 1

    def headers(self, who: str, limits: Limits) -> list[tuple[bytes, bytes]]:
        """What is left, as OpenAI's API tells it."""
        if limits.requests_per_minute is None:
            return []
        left = max(0, limits.requests_per_minute - len(self._usage[who].times))
        return [
            (b"x-ratelimit-limit-requests", str(limits.requests_per_minute).encode()),
            (b"x-ratelimit-remaining-requests", str(left).encode()),
        ]
