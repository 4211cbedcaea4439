"""Requirements on a host, shared by `llm-ray doctor` and preflight. Each words the remedy itself: a command in doctor,
an inventory variable in preflight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

GIB = 2**30
PYTHONS = ((3, 11), (3, 13))
"""First and last Python version that Ray nodes and the package support."""
PYTHON_WORDS = "3.11, 3.12 or 3.13"
# The defaults of the role preflight repeat these.
CPU_FLAGS = ("avx2",)
MIN_CORES = 2
MIN_MEMORY_GIB = 3.5
"""Less than 4, since the kernel of a 4 GB machine reserves some memory."""
MIN_DISK_GIB = 10
"""Space for one environment, its package cache, and Ray's sessions."""
MAX_CLOCK_SKEW = 5
"""Maximum difference between two hosts' clocks, in seconds."""
INSTALLED_DISK_GIB = 1
"""Minimum free disk once the environment is installed."""
STORE_SHARE = 0.8
"""Maximum share of memory for Ray's object store; everything else needs the rest."""


def python_fits(version: Sequence[int]) -> bool:
    return PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[-1]


def missing_flags(flags: Iterable[str], wanted: Iterable[str] = CPU_FLAGS) -> list[str]:
    """Returns the wanted flags that a CPU lacks; torch and vLLM are built for them."""
    return sorted(set(wanted) - set(flags))


def needed_disk(installed: bool, minimum: float = MIN_DISK_GIB) -> float:
    """Returns the GiB that must be free on a host, less if its environment is installed."""
    return INSTALLED_DISK_GIB if installed else minimum


def store_fault(store: float, shm: float, memory: float) -> Literal["shm", "memory"] | None:
    """Returns what is too small for an object store of `store` GiB: /dev/shm, where Ray keeps it, or the memory behind
    it."""
    return "shm" if store > shm else "memory" if store > STORE_SHARE * memory else None


def clock_skew(earliest: float, now: float, latest: float) -> float:
    """Returns by how many seconds a clock that shows `now` is off a clock that showed `earliest` before and `latest`
    after the reading."""
    return max(earliest - now, now - latest, 0)
