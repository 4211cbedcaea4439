"""What workers settle among themselves, over the process group that Ray Train set up (or alone, without one)."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
