"""Answers are sent on as they come to few clients, in handfuls to many, and nothing is lost or held back at their
ends."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from llm_ray.serve.replica import streams
from llm_ray.serve.replica.streams import TOKEN_BY_TOKEN, CoalescedOutputs, collected


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that whatever waits for its time is seen to."""
    monkeypatch.setattr(streams, "_EACH", 6000.0)
    monkeypatch.setattr(streams, "_MOST", 60.0)
    monkeypatch.setattr(streams, "_streams", weakref.WeakSet())


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10), debug=False)


def token(text: str, last: bool = False) -> RequestOutput:
    completion = CompletionOutput(0, text, [1], None, None, finish_reason="stop" if last else None)
    return RequestOutput("r", None, [0], None, [completion], last)


def stream(kind: RequestOutputKind = RequestOutputKind.DELTA) -> CoalescedOutputs:
    return CoalescedOutputs(kind, "r")


async def taken(outputs: CoalescedOutputs) -> str:
    output = outputs.get_nowait() or await outputs.get()
    assert isinstance(output, RequestOutput)
    return output.outputs[0].text


async def held(outputs: CoalescedOutputs) -> bool:
    waiting = asyncio.ensure_future(outputs.get())
    await asyncio.wait({waiting}, timeout=0.05)
    return not (waiting.done() or not waiting.cancel())


def test_one_stream_gets_each_token_at_once() -> None:
    async def test() -> None:
        alone = stream()
        for text in "abc":
            alone.put(token(text))
            assert await taken(alone) == text

    run(test())


def test_of_several_streams_the_first_token_and_the_end_go_at_once() -> None:
    async def test() -> None:
        outputs, other = stream(), stream()
        outputs.put(token("a"))
        assert await taken(outputs) == "a"
        outputs.put(token("b"))
        outputs.put(token("c"))
        assert await held(outputs)
        outputs.put(token("d", last=True))
        assert await taken(outputs) == "bcd"
        other.put(token("x"))
        assert await taken(other) == "x"
        other.put(token("y"))
        assert await taken(other) == "y", "the first has ended: this one is alone"

    run(test())


def test_who_waits_already_is_held_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST", 0.2)

    async def test() -> None:
        outputs, _other = stream(), stream()
        outputs.put(token("a"))
        await taken(outputs)
        for text, whole in (("b", "bc"), ("d", "de")):
            waiting = asyncio.ensure_future(taken(outputs))
            await asyncio.sleep(0)
            outputs.put(token(text))
            await asyncio.sleep(0.01)
            outputs.put(token(whole[1]))
            assert await waiting == whole

    run(test())


def test_what_was_held_back_comes_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST", 0.02)

    async def test() -> None:
        outputs, _other = stream(), stream()
        for text in "abc":
            outputs.put(token(text))
            assert await taken(outputs) == text

    run(test())


def test_an_error_is_told_at_once() -> None:
    async def test() -> None:
        outputs, _other = stream(), stream()
        outputs.put(token("a"))
        await taken(outputs)
        outputs.put(token("b"))
        outputs.put(ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            await taken(outputs)

    run(test())


def test_answers_that_may_be_tool_calls_and_whole_ones_are_not_held_back() -> None:
    async def test() -> None:
        TOKEN_BY_TOKEN.set(True)
        tools, _other, whole = stream(), stream(), stream(RequestOutputKind.FINAL_ONLY)
        for text in "ab":
            tools.put(token(text))
            assert await taken(tools) == text
        whole.put(token("all", last=True))
        assert await taken(whole) == "all"

    contextvars.copy_context().run(run, test())


def test_who_has_gone_away_counts_no_longer() -> None:
    async def test() -> None:
        outputs, gone = stream(), stream()
        gone.put(token("a"))
        gone.close()
        for text in "ab":
            outputs.put(token(text))
            assert await taken(outputs) == text

    run(test())


# Events ---------------------------------------------------------------------------------------------------------------


async def events(*given: str | Exception, closed: list[bool] | None = None) -> AsyncGenerator[str, None]:
    try:
        for event in given:
            if isinstance(event, Exception):
                raise event
            yield event
        if closed is not None:
            await asyncio.Event().wait()
    finally:
        if closed is not None:
            closed.append(True)


def test_events_that_come_together_go_together() -> None:
    async def test() -> None:
        assert [part async for part in collected(events("a", "b", "c"))] == [["a", "b", "c"]]

    run(test())


def test_an_error_comes_after_what_was_before_it() -> None:
    async def test() -> None:
        got = []
        with pytest.raises(ValueError, match="broken"):
            async for part in collected(events("a", "b", ValueError("broken"))):
                got += part
        assert got == ["a", "b"]

    run(test())


def test_a_stream_that_nobody_reads_on_ends_what_makes_it() -> None:
    async def test() -> None:
        closed: list[bool] = []
        reading = collected(events("a", closed=closed))
        assert await anext(reading) == ["a"]
        await reading.aclose()
        async with asyncio.timeout(5):
            while not closed:
                await asyncio.sleep(0)

    run(test())
