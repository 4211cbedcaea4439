"""Divides a host's cores among the processes of the bundle.

Ray counts CPUs but does not pin workers: without pinning, two workers on a host may run on the same cores. A process
claims cores with file locks, which the kernel releases however the process dies.

Compute has priority: its threads synchronize at every layer of a model, so a moment taken from one thread by Ray, Serve
or a gateway delays all. Such services are started in the `background`, where Linux lets them wait for the end of a time
slice instead of preempting (SCHED_BATCH, see sched(7)); `foreground` is for compute.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu")
_held: list[int] = []  # file descriptors of the locks, released with the process


@dataclass(frozen=True)
class Core:
    """A logical CPU with its physical core (package id, core id) and NUMA node."""

    cpu: int
    core: tuple[int, int]
    numa_node: int


def list_cores() -> list[Core]:
    """Returns the logical CPUs this process may run on, ordered by NUMA node, the first thread of each core before its
    siblings."""
    cores = [Core(cpu, _physical(cpu), _numa_node(cpu)) for cpu in sorted(os.sched_getaffinity(0))]
    seen: dict[tuple[int, int], int] = {}
    order: dict[int, int] = {}
    for core in cores:
        order[core.cpu] = seen.get(core.core, 0)
        seen[core.core] = order[core.cpu] + 1
    return sorted(cores, key=lambda c: (c.numa_node, order[c.cpu], c.cpu))


def claim_cores(count: int) -> list[Core]:
    """Claims `count` cores for this process, on a single NUMA node if possible.

    Returns an empty list if too few are free because other processes on this host hold them; the caller then runs
    unpinned.
    """
    free = [(core, fd) for core in list_cores() if (fd := _lock(core.cpu)) is not None]
    by_node: dict[int, list[tuple[Core, int]]] = {}
    for item in free:
        by_node.setdefault(item[0].numa_node, []).append(item)
    fitting = [items for items in by_node.values() if len(items) >= count]
    chosen = min(fitting, key=len)[:count] if fitting else free[:count]
    if len(chosen) < count:
        chosen = []
    for item in free:
        if item not in chosen:
            os.close(item[1])
    _held.extend(fd for _, fd in chosen)
    return [core for core, _ in chosen]


def bind(count: int) -> tuple[int, str]:
    """Pins the calling thread, and threads it starts, to `count` claimed cores, in the foreground.

    Returns the number of compute threads (one per physical core) and a description for the user.
    """
    foreground()
    cores = claim_cores(count)
    if not cores:
        return count, f"{count} threads, not bound: other processes use this host's cores"
    os.sched_setaffinity(0, {core.cpu for core in cores})
    threads = len({core.core for core in cores})
    nodes = sorted({core.numa_node for core in cores})
    return threads, f"{threads} threads on CPUs {_ranges([c.cpu for c in cores])}, NUMA node {_ranges(nodes)}"


@contextlib.contextmanager
def background() -> Iterator[None]:
    """Processes started by the calling thread in this block do not preempt compute."""
    before = os.sched_getscheduler(0)
    _schedule(os.SCHED_BATCH)
    try:
        yield
    finally:
        _schedule(before)


def foreground() -> None:
    """Gives the calling thread, and threads it starts from now on, normal scheduling for compute."""
    _schedule(os.SCHED_OTHER)


def _schedule(policy: int) -> None:
    with contextlib.suppress(OSError):  # a container may forbid it; only performance suffers
        os.sched_setscheduler(0, policy, os.sched_param(0))


def _lock(cpu: int) -> int | None:
    folder = Path(tempfile.gettempdir()) / f"llm-ray-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(folder / str(cpu), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _physical(cpu: int) -> tuple[int, int]:
    topology = _SYSFS / f"cpu{cpu}" / "topology"
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text())
    except (OSError, ValueError):  # containers may hide the topology
        return 0, cpu


def _numa_node(cpu: int) -> int:
    nodes = sorted((_SYSFS / f"cpu{cpu}").glob("node[0-9]*"))
    return int(nodes[0].name.removeprefix("node")) if nodes else 0


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
