"""Streams are sent on as they come to few clients, in handfuls to many, and never lose or hold back anything at their ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from llm_ray.serve import pace
from llm_ray.serve.pace import Pace


class Source:
    """Events that come when the test says so."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.closed = False

    def put(self, *events: str | Exception | None) -> None:
        for event in events:
            self.queue.put_nowait(event)

    async def events(self) -> AsyncGenerator[str, None]:
        try:
            while (event := await self.queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that whatever waits for the pause is seen to."""
    monkeypatch.setattr(pace, "_EACH", 60.0)
    monkeypatch.setattr(pace, "_MOST", 60.0)


def run(test: object) -> None:
    asyncio.run(asyncio.wait_for(test, 10))  # type: ignore[arg-type]


def test_one_stream_gets_each_event_at_once() -> None:
    async def test() -> None:
        source = Source()
        stream = Pace().collected(source.events())
        for event in "abc":
            source.put(event)
            assert await anext(stream) == [event]
        source.put(None)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(test())


def test_of_several_streams_the_first_event_and_the_end_go_at_once() -> None:
    async def test() -> None:
        paced, sources = Pace(), [Source(), Source()]
        streams = [paced.collected(source.events()) for source in sources]
        for source, stream in zip(sources, streams, strict=True):
            source.put("a")
            assert await anext(stream) == ["a"]
        sources[0].put("b", "c")
        second = asyncio.ensure_future(anext(streams[0]))
        await asyncio.wait({second}, timeout=0.05)
        assert not second.done()
        sources[0].put("d", None)
        assert await second == ["b", "c", "d"]
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])
        assert await _last(paced) == ["z"]
        await streams[1].aclose()

    async def _last(paced: Pace) -> list[str]:
        source = Source()
        source.put("z", None)
        return [event for events in [part async for part in paced.collected(source.events())] for event in events]

    run(test())


def test_an_error_comes_after_what_was_before_it() -> None:
    async def test() -> None:
        source = Source()
        source.put("a", "b", ValueError("broken"))
        got = []
        with pytest.raises(ValueError, match="broken"):
            async for events in Pace().collected(source.events()):
                got += events
        assert got == ["a", "b"]

    run(test())


def test_a_stream_that_nobody_reads_on_ends_what_makes_it() -> None:
    async def test() -> None:
        paced, source = Pace(), Source()
        stream = paced.collected(source.events())
        source.put("a")
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(5):
            while not source.closed:
                await asyncio.sleep(0)

    run(test())
