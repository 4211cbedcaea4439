"""Coordination among workers, over the process group that Ray Train set up (or without one, for a single worker)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llm_ray.errors import LlmRayError

T = TypeVar("T")


GATHERS, GATHERED = 16, 2**16
"""Collectives, and bytes of each, after which every thread of gloo has computed once: it has two, and torch computes
more than 2**15 elements with several threads."""


def use_threads(threads: int) -> None:
    """Have this thread compute with so many threads, and those of the process group with one.

    Gloo copies what it gathers in threads of its own. Whichever has once copied much with several threads (a checkpoint
    gathers its plan) keeps them, and from then on OpenMP has more threads than cores: GNU's runtime no longer waits for
    a moment between two loops, but puts each to sleep, and a step of short rows takes nearly twice as long.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        torch.set_num_threads(1)  # what a thread finds when it first computes, it keeps
        block = torch.zeros(GATHERED, dtype=torch.uint8)
        into = [[torch.empty_like(block) for _ in range(world_size())] for _ in range(GATHERS)]
        for work in [dist.all_gather(blocks, block, async_op=True) for blocks in into]:
            work.wait()
    torch.set_num_threads(threads)


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
