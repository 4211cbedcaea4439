"""How often a streamed answer is sent on: each token at once to a few clients, several tokens together to many.

A message on its way from the replica to the client costs some milliseconds of computing time, in the replica, the gateway and Serve's proxy:
at sixteen streams that is a third of what the tokens themselves cost on two cores. The more streams a replica has, the longer what comes
is collected; the first token, and the end of an answer, always go at once, and each token stays an event of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

# Seconds that are collected, for each stream beside the first, and at most: sixteen streams get four messages a second each.
_EACH = 0.016
_MOST = 0.25


class Pace:
    """The streams of a replica."""

    def __init__(self) -> None:
        self._streams = 0

    async def collected(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[list[str], None]:
        """The events, in lists. Raises what `events` raises, after what came before."""
        waiting: list[str] = []
        arrived = asyncio.Event()

        async def read() -> None:
            try:
                async for event in events:
                    waiting.append(event)
                    arrived.set()
            finally:
                arrived.set()

        self._streams += 1
        reading = asyncio.create_task(read())
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                if waiting:
                    ready, waiting[:] = waiting[:], []
                    yield ready
                elif reading.done():
                    reading.result()
                    return
                if pause := min((self._streams - 1) * _EACH, _MOST):
                    await asyncio.wait({reading}, timeout=pause)
                if reading.done():
                    arrived.set()
        finally:
            self._streams -= 1
            reading.cancel()
