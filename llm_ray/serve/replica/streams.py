"""Stream batching: each token is sent immediately to few clients, several tokens together to many.

An event on its way from the engine to the client costs some milliseconds of computing time: in vLLM's front end, which
makes it, in the replica, the gateway and Serve's proxy. At sixteen streams that is a third of what the tokens
themselves cost on two cores. So the more streams a replica has, and the fewer cores there are, the longer new tokens
are held back to become one event. The first token, and the end of an answer, always go at once; so does each token of
an answer that may be a tool call, for it is parsed piece by piece.
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

# Seconds that tokens are held back, for each stream beside the first, by the number of cores; and at most.
_EACH = 0.04
_MOST = 0.3

# Whether the answer to the request at hand is sent token by token.
TOKEN_BY_TOKEN: ContextVar[bool] = ContextVar("token_by_token", default=False)

_streams: weakref.WeakSet[CoalescedOutputs] = weakref.WeakSet()


class CoalescedOutputs(RequestOutputCollector):
    """What vLLM's front end collects an answer's new tokens in; whoever takes them out gets those that have come
    meanwhile as one."""

    output: RequestOutput | PoolingRequestOutput | Exception | None

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self._paced = self.aggregate and not TOKEN_BY_TOKEN.get()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        if self.aggregate:
            _streams.add(self)

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Take in what is new; it is ready at once, unless something was taken out a moment ago."""
        last = isinstance(output, Exception) or output.finished
        if self._paced and not last and self.output is None and (wait := self._due - time.monotonic()) > 0:
            self.output = output  # and whoever waits for it goes on waiting
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
        """What is new, as soon as it is ready. Raises what came in place of it."""
        await self.ready.wait()
        self._due = time.monotonic() + min((len(_streams) - 1) * _EACH / (os.cpu_count() or 1), _MOST)
        return await super().get()

    def close(self) -> None:
        """It is read no more."""
        _streams.discard(self)
        super().close()

    def get_nowait(self) -> RequestOutput | PoolingRequestOutput | None:
        """None: `get` waits until it is time."""
        return None


async def collected(events: AsyncGenerator[str, None]) -> AsyncGenerator[list[str], None]:
    """The events, those that come together in one list. Raises what `events` raises, after what came before."""
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
