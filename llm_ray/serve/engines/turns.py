"""Whose requests are computed by an engine that can apply only one LoRA adapter at a time.

Requests of one adapter (or of the base, number 0) are computed together; this is its turn. While nobody else waits, a
turn has no end. Once others do, it takes new requests for `TAKES` steps more and ends when the running ones are
answered; after `LASTS` steps they are paused, and wait for their adapter's next turn. The next turn is that of the
request that has waited longest, so that nobody waits for more than a turn of each other adapter.

    turns.wait("a", 1)            # a request for adapter 1
    turns.next(running=0)         # 1: the adapter to apply now; None where nothing changes
    turns.take(room=8)            # ["a"]: the requests to start
    turns.count()                 # after each step
    turns.over()                  # whether the running ones are to be paused
"""

from __future__ import annotations

BASE = 0
# Steps of a turn while others wait: a step is a token of each running request.
TAKES = 32
LASTS = 256


class Turns:
    """Waiting requests, in the order in which they came, and the adapter whose turn it is."""

    def __init__(self, takes: int = TAKES, lasts: int = LASTS) -> None:
        self.active = BASE
        self.takes, self.lasts = takes, lasts
        self._waiting: dict[str, int] = {}
        self._steps = 0  # of this turn, since others wait

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, request_id: str, adapter: int) -> None:
        """Queue a request, behind all that wait."""
        self._waiting[request_id] = adapter

    def leave(self, request_id: str) -> None:
        """Forget a request that waits, or does not."""
        self._waiting.pop(request_id, None)

    def next(self, running: int) -> int | None:
        """The adapter whose turn begins now; None while the turn goes on, with `running` requests."""
        if running or not self._waiting or not (self._closed() or self.active not in self._waiting.values()):
            return None
        self.active = next(adapter for adapter in self._waiting.values() if adapter != self.active)
        self._steps = 0
        return self.active

    def take(self, room: int) -> list[str]:
        """Requests to start now, `room` at most; they do not wait any more."""
        if self._closed():
            return []
        taken = [request_id for request_id, adapter in self._waiting.items() if adapter == self.active][:room]
        for request_id in taken:
            del self._waiting[request_id]
        return taken

    def count(self) -> None:
        """A step was computed."""
        self._steps = self._steps + 1 if self._others() else 0

    def over(self) -> bool:
        """Whether running requests have to make way for others."""
        return self._steps >= self.lasts and self._others()

    def _closed(self) -> bool:
        return self._steps >= self.takes and self._others()

    def _others(self) -> bool:
        return any(adapter != self.active for adapter in self._waiting.values())
