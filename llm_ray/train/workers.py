"""What workers settle among themselves, over the process group that Ray Train set up (or alone, without one)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llm_ray.errors import LlmRayError

T = TypeVar("T")


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
