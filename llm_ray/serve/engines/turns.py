"""Schedules requests on an engine that can apply only one LoRA adapter at a time.

Requests of the same adapter (or of the base model, number 0) run together, in a turn. While no others wait, the turn
continues. Once others wait, it admits new requests for `ADMIT_STEPS` more steps and ends when the running ones finish;
after `MAX_STEPS` steps they are paused until their adapter's next turn. The next turn goes to the adapter of the
request that has waited longest, so no request waits for more than one turn of each other adapter.

    turns.wait("a", 1)            # a request for adapter 1
    turns.next(running=0)         # 1: the adapter to apply now; None if it stays the same
    turns.take(room=8)            # ["a"]: the requests to start
    turns.count()                 # after each step
    turns.over()                  # whether to pause the running requests
"""

from __future__ import annotations

BASE = 0
# Limits of a turn in steps while others wait. A step computes one token for each running request.
ADMIT_STEPS = 32
MAX_STEPS = 256


class Turns:
    """Waiting requests in order of arrival, and the active adapter."""

    def __init__(self, admit_steps: int = ADMIT_STEPS, max_steps: int = MAX_STEPS) -> None:
        self.active = BASE
        self.admit_steps, self.max_steps = admit_steps, max_steps
        self._waiting: dict[str, int] = {}
        self._steps = 0  # of this turn, since others began to wait

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, request_id: str, adapter: int) -> None:
        """Queues a request."""
        self._waiting[request_id] = adapter

    def leave(self, request_id: str) -> None:
        """Removes a request from the queue, if it is there."""
        self._waiting.pop(request_id, None)

    def next(self, running: int) -> int | None:
        """Returns the adapter whose turn begins now; None if the current turn continues with its `running` requests."""
        if running or not self._waiting or not (self._closed() or self.active not in self._waiting.values()):
            return None
        self.active = next(adapter for adapter in self._waiting.values() if adapter != self.active)
        self._steps = 0
        return self.active

    def take(self, room: int) -> list[str]:
        """Removes up to `room` requests to start now from the queue and returns them."""
        if self._closed():
            return []
        started = [request_id for request_id, adapter in self._waiting.items() if adapter == self.active][:room]
        for request_id in started:
            del self._waiting[request_id]
        return started

    def count(self) -> None:
        """Counts a computed step."""
        self._steps = self._steps + 1 if self._others() else 0

    def over(self) -> bool:
        """Returns whether running requests must be paused for others."""
        return self._steps >= self.max_steps and self._others()

    def _closed(self) -> bool:
        return self._steps >= self.admit_steps and self._others()

    def _others(self) -> bool:
        return any(adapter != self.active for adapter in self._waiting.values())
