"""Coordination among workers, over the process group that Ray Train set up (or without one, for a single worker)."""

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
"""Collectives of a round, and bytes of each, which take a thread of gloo some milliseconds: torch computes more than 2**15
elements with several threads. They are the same on all workers, or these would wait for each other."""
_COMPUTED, _SEEN = 400_000, 3
"""Nanoseconds on a core after which a thread has done more than to find nothing to do, and in how many rounds that is
to be seen: what a hypervisor takes from a core counts as well."""
_ROUNDS = 500


def use_threads(threads: int) -> None:
    """Have this thread compute with so many threads, and those of the process group with one.

    Gloo copies what it gathers in threads of its own. Whichever has once copied much with several threads (a checkpoint
    gathers its plan) keeps them, and from then on OpenMP has more threads than cores: GNU's runtime no longer waits for
    a moment between two loops, but puts each to sleep, and a step of short rows takes nearly twice as long.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        torch.set_num_threads(1)  # what a thread finds when it first computes, it keeps
        block = torch.zeros(_GATHERED, dtype=torch.uint8)
        seen = dict.fromkeys(_nanoseconds_of_gloo(), 0)
        for _ in range(_ROUNDS):  # on a busy machine one of them may do the work of all before another wakes up
            before = _nanoseconds_of_gloo()
            into = [[torch.empty_like(block) for _ in range(world_size())] for _ in range(_GATHERS)]
            for work in [dist.all_gather(blocks, block, async_op=True) for blocks in into]:
                work.wait()
            for thread, on in _nanoseconds_of_gloo().items():
                seen[thread] = seen.get(thread, 0) + (on - before.get(thread, on) > _COMPUTED)
            if not total(float(any(times < _SEEN for times in seen.values())))[0]:
                break
    torch.set_num_threads(threads)


def _nanoseconds_of_gloo() -> dict[str, int]:
    """Nanoseconds that each of gloo's threads has been on a core, by its id; empty where the kernel does not tell."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if (task / "comm").read_text().strip() == "pt_gloo_runloop":
                found[task.name] = int((task / "schedstat").read_text().split()[0])
    return found


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(problem: str | None) -> str | None:
    """The first worker's problem, on every worker; None when no worker has one. Also a barrier."""
    if world_size() == 1:
        return problem
    problems: list[str | None] = [None] * world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


class OtherWorkerFailed(LlmRayError):
    """Another worker failed at what all have to do."""


def together(work: Callable[[], T]) -> T:
    """What `work` returns, when it succeeds on every worker. Raises LlmRayError on every worker where one failed: alone
    it would leave the others waiting for it."""
    result, problem = None, None
    try:
        result = work()
    except LlmRayError as error:
        problem = error
    if total(float(problem is not None))[0]:
        raise problem or OtherWorkerFailed("another worker failed")
    return cast(T, result)


def first(value: T) -> T:
    """Worker 0's value, on every worker."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def total(*values: float) -> list[float]:
    """Each value summed over all workers, the same on every one."""
    if world_size() == 1:
        return list(values)
    sums: Tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()
