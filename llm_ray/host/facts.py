"""What a host is: its CPU, memory, limits, sockets, file systems and clock, as Linux tells it.

`llm-ray doctor` reads them here; the Ansible module preflight_probe brings this file to hosts on which nothing of ours is
installed. It therefore needs Python's own library alone, of Python 3.9 or later, and changes nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SHARED_MEMORY = "/dev/shm"  # noqa: S108
_UNLIMITED = 2**60  # what cgroup v1 writes for no limit is a little below 2**63


class Socket(NamedTuple):
    """A listening TCP socket."""

    port: int
    uid: int
    inode: str


class Mount(NamedTuple):
    """A mounted file system."""

    point: str
    type: str
    source: str


class Limits(NamedTuple):
    """What control groups allow this process at most; None where they set no limit."""

    cpus: float | None
    """CPUs' worth of time."""
    memory: int | None
    """In bytes."""
    tasks: int | None
    """Processes and threads."""


def read(path: str | Path) -> str:
    """The text of a file without spaces around it; empty where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


# CPU and memory -------------------------------------------------------------------------------------------------------


def cpu_flags(text: str) -> list[str]:
    """The flags of the first core in a /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return found[1].split() if found else []


def usable_cpus() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def total_memory() -> int:
    """In bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory(text: str) -> dict[str, int]:
    """The rows of a /proc/meminfo that are sizes, in bytes."""
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def limits(text: str, root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """The limits of the groups in a /proc/self/cgroup and of all above them, of either version of cgroups.

    In a container a group's path may be the host's, which is not there: then those of the root count.
    """
    groups = {
        name: path for _, names, path in (line.split(":", 2) for line in text.splitlines()) for name in names.split(",")
    }

    def folders(controller: str) -> Iterator[Path]:
        top = root / controller if controller in groups else root
        folder = top / groups.get(controller, groups.get("", "/")).lstrip("/")
        return (one for one in (folder, *folder.parents) if one == top or top in one.parents)

    def least(values: Iterator[float]) -> float | None:
        return min((value for value in values if 0 < value < _UNLIMITED), default=None)

    def numbers(controller: str, *names: str) -> Iterator[float]:
        for folder in folders(controller):
            for value in (read(folder / name) for name in names):
                if value.isdigit():
                    yield float(value)

    def quotas() -> Iterator[float]:
        for folder in folders("cpu"):
            pair = read(folder / "cpu.max").split() or [
                read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")
            ]
            if all(part.isdigit() for part in pair) and len(pair) == 2:
                yield int(pair[0]) / int(pair[1])

    size, tasks = least(numbers("memory", "memory.max", "memory.limit_in_bytes")), least(numbers("pids", "pids.max"))
    return Limits(least(quotas()), None if size is None else int(size), None if tasks is None else int(tasks))


# Ports ----------------------------------------------------------------------------------------------------------------


def listening(text: str) -> Iterator[Socket]:
    """The listening sockets of a /proc/net/tcp."""
    for line in text.splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            yield Socket(int(words[1].rsplit(":", 1)[1], 16), int(words[7]), words[9])


def taken(ports: Mapping[str, Any], own: set[int]) -> list[dict[str, Any]]:
    """Of the ports (numbers, or from-to) by name those on which a process listens whose user is not among `own`: name,
    port, and `by` and `pid` of the process, empty and 0 where it cannot be seen."""
    sockets = [one for path in ("/proc/net/tcp", "/proc/net/tcp6") for one in listening(read(path))]
    found = {}
    for name, value in ports.items():
        low, _, high = str(value).partition("-")
        for socket in sockets:
            if int(low) <= socket.port <= int(high or low) and socket.uid not in own:
                command, pid = holder(socket.inode)
                by = f"{command} (process {pid})" if pid else ""
                found[name] = {"name": name, "port": socket.port, "by": by, "pid": pid}
    return list(found.values())


def holder(inode: str) -> tuple[str, int]:
    """Name and id of the process that holds a socket; empty and 0 where it cannot be seen."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(str(link.readlink()) == f"socket:[{inode}]" for link in (entry / "fd").iterdir()):
                return read(entry / "comm"), int(entry.name)
        except OSError:
            continue
    return "", 0


# Storage --------------------------------------------------------------------------------------------------------------


def existing(path: str | Path) -> Path:
    """The nearest folder above that is there, as far as this user can see."""
    folder = Path(path)
    return next(one for one in (folder, *folder.parents) if _is_folder(one))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # below a folder of another user's
        return False


def free_disk(path: str | Path) -> int:
    """Bytes that this user may still write where the path lies, or will."""
    return shutil.disk_usage(existing(path)).free


def shared_memory() -> int:
    """The size of shared memory in bytes."""
    return shutil.disk_usage(SHARED_MEMORY).total


def mount_of(path: Path, text: str) -> Mount:
    """The file system of a /proc/self/mountinfo that an absolute path is in."""
    found = Mount("/", "", "")
    for line in text.splitlines():
        place, _, rest = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), place.split()[4])
        if len(point) >= len(found.point) and (path == Path(point) or Path(point) in path.parents):
            found = Mount(point, *rest.split()[:2])
    return found


def filesystems() -> list[str]:
    """Of nfs and nfsd those that the kernel has, loaded or as modules."""
    modules = Path("/lib/modules") / os.uname().release
    text = read("/proc/filesystems") + read(modules / "modules.dep") + read(modules / "modules.builtin")
    return [name for name in ("nfs", "nfsd") if re.search(rf"\b{name}$|/{name}\.ko", text, re.M)]


# Programs and the clock -----------------------------------------------------------------------------------------------


def interpreter(candidates: Sequence[str]) -> dict[str, Any]:
    """The first candidate that runs, and its version; without one the first, and no version."""
    for path in candidates:
        try:
            line = [path, "-c", "import json, sys; print(json.dumps(sys.version_info[:3]))"]
            done = subprocess.run(line, capture_output=True, timeout=30, check=True)
            return {"path": path, "version": json.loads(done.stdout)}
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
    return {"path": candidates[0] if candidates else "", "version": []}


def clock_synchronised() -> bool | None:
    """Whether the kernel's clock is kept by NTP or the like, as adjtimex(2) says; None where it may not be asked."""
    state = ctypes.create_string_buffer(512)  # struct timex, its first field 0: only read
    if ctypes.CDLL(None).adjtimex(state) < 0:
        return None
    # Before `status`: modes, and four longs.
    status = ctypes.c_int.from_buffer(state, 5 * ctypes.sizeof(ctypes.c_long)).value
    return not status & 0x40  # STA_UNSYNC
