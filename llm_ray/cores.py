"""A host's cores, divided among the processes of the bundle.

Ray counts CPUs but binds nothing: two workers on a host run on the same cores unless each is told its own. A process
claims cores with file locks, which the kernel releases however the process dies.

What computes comes first: its threads wait for each other at every layer of a model, so that a moment which Ray, Serve
or a gateway takes from one is lost to all. Those are started in the `background`, where Linux has them wait for the end
of a time slice (SCHED_BATCH, see sched(7)) and not interrupt; `foreground` is for what computes.
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
_held: list[int] = []  # descriptors of the locks: closed with the process


@dataclass(frozen=True)
class Core:
    """A logical CPU, the physical core it is a thread of, and its NUMA node."""

    cpu: int
    core: tuple[int, int]
    numa_node: int


def list_cores() -> list[Core]:
    """The logical CPUs this process may run on; a NUMA node's first threads of each core come before their siblings."""
    cores = [Core(cpu, _physical(cpu), _numa_node(cpu)) for cpu in sorted(os.sched_getaffinity(0))]
    seen: dict[tuple[int, int], int] = {}
    order: dict[int, int] = {}
    for core in cores:
        order[core.cpu] = seen.get(core.core, 0)
        seen[core.core] = order[core.cpu] + 1
    return sorted(cores, key=lambda c: (c.numa_node, order[c.cpu], c.cpu))


def claim_cores(count: int) -> list[Core]:
    """Claim `count` cores for this process, of one NUMA node where one has enough free ones.

    Returns an empty list when fewer are free, because others that run on this host have claimed them: run unbound then.
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
    """Bind the calling thread, and the threads it starts, to `count` cores of its own, in the foreground.

    Returns the number of compute threads to use (one a physical core) and, in words, what was done.
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
    """Processes that the calling thread starts in here do not interrupt what computes."""
    before = os.sched_getscheduler(0)
    _schedule(os.SCHED_BATCH)
    try:
        yield
    finally:
        _schedule(before)


def foreground() -> None:
    """The calling thread, and the threads it starts from now on, compute."""
    _schedule(os.SCHED_OTHER)


def _schedule(policy: int) -> None:
    with contextlib.suppress(OSError):  # a container may forbid it, and then it only takes longer
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
