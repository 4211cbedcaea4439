"""What a host needs: the rules that `llm-ray doctor` and preflight judge facts by. What is to be done about a fault is
theirs to say, since it is a command in the one case and a variable of the inventory in the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

GIB = 2**30
PYTHONS = ((3, 11), (3, 13))
"""The versions of Python that Ray nodes and the package run with, first and last."""
PYTHON_WORDS = "3.11, 3.12 or 3.13"
# The role preflight has these as defaults of its variables.
CPU_FLAGS = ("avx2",)
MIN_CORES = 2
MIN_MEMORY_GIB = 3.5
"""The kernel of a machine of 4 GB keeps some of it."""
MIN_DISK_GIB = 10
"""Room for one environment, the cache it is made from, and Ray's sessions."""
MAX_CLOCK_SKEW = 5
"""Seconds between two hosts' clocks."""
INSTALLED_DISK_GIB = 1
"""What is installed needs no room again."""
STORE_SHARE = 0.8
"""Of the memory, at most so much for Ray's object store: the rest must stay to everything else."""


def python_fits(version: Sequence[int]) -> bool:
    return PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[-1]


def missing_flags(flags: Iterable[str], wanted: Iterable[str] = CPU_FLAGS) -> list[str]:
    """The wanted flags that a CPU lacks: torch and vLLM are built for them."""
    return sorted(set(wanted) - set(flags))


def needed_disk(installed: bool, minimum: float = MIN_DISK_GIB) -> float:
    """GiB that have to be free on a host, or on one that has its environment already."""
    return INSTALLED_DISK_GIB if installed else minimum


def store_fault(store: float, shm: float, memory: float) -> Literal["shm", "memory"] | None:
    """What an object store of so many GiB does not fit: /dev/shm, where Ray keeps it, or the memory behind that."""
    return "shm" if store > shm else "memory" if store > STORE_SHARE * memory else None


def clock_skew(earliest: float, now: float, latest: float) -> float:
    """Seconds that a clock showing `now` is off one which showed `earliest` before it was read and `latest` after."""
    return max(earliest - now, now - latest, 0)
