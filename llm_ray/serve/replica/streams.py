"""Stream batching: tokens are sent one by one while a replica has few streams, and in groups when it has many.

An event costs some milliseconds of CPU time on its way from the engine to the client: in vLLM's front end, the replica,
the gateway and Serve's proxy. At sixteen streams that is a third of the cost of the tokens themselves on two cores. So
tokens are held back longer, and merged into one event, the more streams a replica has and the fewer its cores. The
first token and the end of an answer are always sent at once, as is each token of an answer that may be a tool call,
because it is parsed incrementally.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncGenerator
from contextvars import ContextVar

from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

# Seconds to hold back tokens: per additional stream (divided by the number of cores), and the maximum.
_EACH = 0.04
_MOST = 0.3

# Whether to send the current request's answer token by token.
TOKEN_BY_TOKEN: ContextVar[bool] = ContextVar("token_by_token", default=False)

_streams: weakref.WeakSet[CoalescedOutputs] = weakref.WeakSet()


class CoalescedOutputs(RequestOutputCollector):
    """vLLM's queue of new tokens of an answer, with a minimum interval between reads. Tokens that arrive in between are
    merged."""

    output: RequestOutput | PoolingRequestOutput | Exception | None

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self._paced = self.aggregate and not TOKEN_BY_TOKEN.get()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        if self.aggregate:
            _streams.add(self)

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Adds output; it becomes readable at once unless the last read was too recent."""
        last = isinstance(output, Exception) or output.finished
        if self._paced and not last and self.output is None and (wait := self._due - time.monotonic()) > 0:
            self.output = output  # the reader is not woken yet
            self._timer = asyncio.get_running_loop().call_later(wait, self._now)
            return
        super().put(output)
        if last:
            _streams.discard(self)
            self._now()

    def _now(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self.ready.set()

    async def get(self) -> RequestOutput | PoolingRequestOutput:
        """Returns the merged output as soon as it is ready. Raises the exception that was put instead of output."""
        await self.ready.wait()
        self._due = time.monotonic() + min((len(_streams) - 1) * _EACH / (os.cpu_count() or 1), _MOST)
        return await super().get()

    def close(self) -> None:
        """Stops reading."""
        _streams.discard(self)
        super().close()

    def get_nowait(self) -> RequestOutput | PoolingRequestOutput | None:
        """Returns None, so that callers use `get`, which waits for the interval."""
        return None


async def collected(events: AsyncGenerator[str, None]) -> AsyncGenerator[list[str], None]:
    """Yields lists of events, each with all events that arrived since the last one. Raises what `events` raises, after
    yielding the events before it."""
    waiting: list[str] = []
    arrived = asyncio.Event()

    async def read() -> None:
        try:
            async for event in events:
                waiting.append(event)
                arrived.set()
        finally:
            arrived.set()

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
            if reading.done():
                arrived.set()
    finally:
        reading.cancel()
