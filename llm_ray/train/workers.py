"""Coordination among workers, over the process group set up by Ray Train (none is needed for a single worker)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llm_ray.errors import LlmRayError

T = TypeVar("T")


_GATHERS, _GATHERED = 2, 2**21
"""Collectives per round, and bytes of each: enough to keep a gloo thread busy for milliseconds, and to make torch use
several threads (above 2**15 elements). They must be equal on all workers, or these would wait for each other."""
_COMPUTED, _SEEN = 400_000, 3
"""A thread has computed in a round if it was on a core for so many nanoseconds, and counts as done after so many such
rounds: a single one may be due to time taken by a hypervisor."""
_ROUNDS = 500


def use_threads(threads: int) -> None:
    """Sets the number of torch threads of this thread to `threads`, and of the process group's threads to one.

    Gloo copies gathered data in its own threads. One that has copied a large tensor with several OpenMP threads (a
    checkpoint gathers its plan) keeps these, so OpenMP has more threads than cores: GNU's runtime then stops spinning
    between loops and puts threads to sleep, and a step of short rows takes nearly twice as long.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        torch.set_num_threads(1)  # a thread keeps the number that is set when it first computes
        block = torch.zeros(_GATHERED, dtype=torch.uint8)
        seen = dict.fromkeys(_nanoseconds_of_gloo(), 0)
        for _ in range(_ROUNDS):  # on a busy machine one thread may do all the work before another wakes up
            before = _nanoseconds_of_gloo()
            into = [[torch.empty_like(block) for _ in range(world_size())] for _ in range(_GATHERS)]
            for work in [dist.all_gather(blocks, block, async_op=True) for blocks in into]:
                work.wait()
            for thread, on in _nanoseconds_of_gloo().items():
                seen[thread] = seen.get(thread, 0) + (on - before.get(thread, on) > _COMPUTED)
            if not all_reduce(float(any(times < _SEEN for times in seen.values())))[0]:
                break
    torch.set_num_threads(threads)


def _nanoseconds_of_gloo() -> dict[str, int]:
    """Nanoseconds on a core of each gloo thread, by thread id; empty if the kernel does not report it."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if (task / "comm").read_text().strip() == "pt_gloo_runloop":
                found[task.name] = int((task / "schedstat").read_text().split()[0])
    return found


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_error(problem: str | None) -> str | None:
    """Returns the problem of the lowest rank that has one, on every worker; None if there is none. Also a barrier."""
    if world_size() == 1:
        return problem
    problems: list[str | None] = [None] * world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


class OtherWorkerFailed(LlmRayError):
    """Another worker failed in a step that all have to complete."""


def run_collectively(work: Callable[[], T]) -> T:
    """Runs `work` and returns its result. If it raises LlmRayError on one worker, raises that there and
    OtherWorkerFailed on the others, which would otherwise wait for it."""
    result, problem = None, None
    try:
        result = work()
    except LlmRayError as error:
        problem = error
    if all_reduce(float(problem is not None))[0]:
        raise problem or OtherWorkerFailed("another worker failed")
    return cast(T, result)


def broadcast(value: T) -> T:
    """Returns worker 0's value on every worker."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce(*values: float) -> list[float]:
    """Returns each value summed over all workers, on every worker."""
    if world_size() == 1:
        return list(values)
    sums: Tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()
