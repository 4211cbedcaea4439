"""An engine in a thread of the replica process, behind the interface of vLLM's engine client.

vLLM's front end (``AsyncLLM``) tokenizes, detokenizes, matches stop strings and implements OpenAI's protocol. The
computation is done by a core: tokens in, tokens out. By default vLLM runs the core in a process that starts another one
for the worker, and each imports vLLM again. Here the core is a thread, so a replica is one process: it starts in a
third of the time, startup errors are raised in the replica, and no process outlives a kill -9. The core releases the
GIL while it computes.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError


class Core(Protocol):
    """Computes tokens. All methods are called in the thread that created the core."""

    def add(self, request: EngineCoreRequest) -> None:
        """Adds a request. Unsupported parameters have been rejected before, by the core's `refusal`."""

    def abort(self, request_ids: list[str]) -> None:
        """Drops requests; unknown ids are ignored. No output follows for them."""

    def has_work(self) -> bool:
        """Returns whether `step` has anything to do."""

    def step(self) -> EngineCoreOutputs:
        """Advances each request by at most one token and returns the new outputs."""

    def call(self, method: str, *args: Any) -> Any:
        """Calls another method of vLLM's engine interface, such as add_lora."""

    def shutdown(self) -> None:
        """Releases memory and threads."""


@dataclass
class _Resources:
    engine_dead: bool = False
    death: Exception | None = None


@dataclass
class _Job:
    run: Callable[[Core], Any]
    done: Future[Any] = field(default_factory=Future)


class EngineThread(EngineCoreClient):
    """Runs the core that `make` returns in its own thread.

    Propagates errors of `make`. If a step raises, the engine is dead: all requests fail, and `resources.death` holds
    the error. A step that hangs cannot be interrupted; `stalled` reports it.
    """

    def __init__(self, make: Callable[[], Core]) -> None:
        self.resources = _Resources()
        self.engine_ranks_managed = [0]
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, started), name="engine", daemon=True)
        self._thread.start()
        started.result()

    def _run(self, make: Callable[[], Core], started: Future[None]) -> None:
        try:
            core = make()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while self._do_jobs(core):
                if core.has_work():
                    outputs = core.step()
                    if outputs.outputs or outputs.scheduler_stats:
                        self._put(outputs)
        except Exception as error:  # after any error the engine's state is undefined
            self.resources.engine_dead, self.resources.death = True, error
            self._put(error)
        finally:
            core.shutdown()

    def _do_jobs(self, core: Core) -> bool:
        """Runs queued jobs, waiting for one if the core has no work; returns False to end the thread."""
        while True:
            self._began = None
            try:
                job = self._jobs.get(block=not core.has_work())
            except queue.Empty:
                return True
            finally:
                self._began = time.monotonic()
            if job is None:
                return False
            if not job.done.set_running_or_notify_cancel():  # cancelled by the caller
                continue
            try:
                job.done.set_result(job.run(core))
            except Exception as error:
                job.done.set_exception(error)

    def stalled(self) -> float:
        """Returns seconds since the current step or job began; 0 if the core is idle."""
        began = self._began
        return time.monotonic() - began if began is not None else 0.0

    def _put(self, outputs: EngineCoreOutputs | Exception) -> None:
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, outputs)

    async def _do(self, run: Callable[[Core], Any]) -> Any:
        if self.resources.engine_dead:
            raise EngineDeadError()
        job = _Job(run)
        self._jobs.put(job)
        return await asyncio.wrap_future(job.done)

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs = await self._outputs.get()
        if isinstance(outputs, Exception):
            raise EngineDeadError() from outputs
        return outputs

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        await self._do(lambda core: core.add(request))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        if request_ids and not self.resources.engine_dead:
            self._jobs.put(_Job(lambda core: core.abort(request_ids)))

    async def get_supported_tasks_async(self) -> Any:
        return await self._do(lambda core: core.call("get_supported_tasks"))

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> Any:
        return await self._do(lambda core: core.call("reset_prefix_cache", reset_running_requests, reset_connector))

    async def add_lora_async(self, lora_request: Any) -> Any:
        return await self._do(lambda core: core.call("add_lora", lora_request))

    async def remove_lora_async(self, lora_id: int) -> Any:
        return await self._do(lambda core: core.call("remove_lora", lora_id))

    async def list_loras_async(self) -> Any:
        return await self._do(lambda core: core.call("list_loras"))

    def shutdown(self, timeout: float | None = None) -> None:
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout if timeout is not None else 10)
