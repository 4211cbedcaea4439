"""A core in its thread: how it is told from outside that it hangs."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

from llm_ray.serve.engines.thread import EngineThread
from tests.unit.serve.engines.arriving import request


class Stuck:
    """A core whose step ends when it is let go, and then has nothing more to do."""

    def __init__(self) -> None:
        self.at_work, self.let_go = threading.Event(), threading.Event()
        self._work = False

    def add(self, request: EngineCoreRequest) -> None:
        self._work = True

    def abort(self, request_ids: list[str]) -> None:
        self._work = False

    def has_work(self) -> bool:
        return self._work

    def step(self) -> EngineCoreOutputs:
        self.at_work.set()
        assert self.let_go.wait(60)
        self._work = False
        return EngineCoreOutputs()

    def call(self, method: str, *args: Any) -> Any:
        return method

    def shutdown(self) -> None:
        pass


async def _until_at_rest(thread: EngineThread) -> None:
    while thread.stalled():
        await asyncio.sleep(0.01)


def test_a_step_that_does_not_end_is_told_and_rest_is_none() -> None:
    core = Stuck()

    async def scenario() -> None:
        thread = EngineThread(lambda: core)
        await _until_at_rest(thread)
        await thread.add_request_async(request("stuck", [1]))
        assert await asyncio.to_thread(core.at_work.wait, 60)
        first = thread.stalled()
        assert first > 0
        while thread.stalled() <= first:
            await asyncio.sleep(0.01)
        core.let_go.set()
        assert await thread.get_supported_tasks_async() == "get_supported_tasks"
        await _until_at_rest(thread)
        thread.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 60))
