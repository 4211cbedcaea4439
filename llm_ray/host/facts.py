"""Reads facts of a host from Linux: CPU, memory, limits, sockets, file systems and clock.

Used by `llm-ray doctor`, and by the Ansible module preflight_probe, which copies this file to hosts without our
packages. It therefore uses only the standard library of Python 3.9 or later, and changes nothing.
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
_UNLIMITED = 2**60  # cgroup v1 writes a value just below 2**63 for no limit


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
    """Limits that control groups set on this process; None means no limit."""

    cpus: float | None
    """CPU time, in CPUs."""
    memory: int | None
    """In bytes."""
    tasks: int | None
    """Processes and threads."""


def read(path: str | Path) -> str:
    """Returns the stripped text of a file; empty if it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


# CPU and memory -------------------------------------------------------------------------------------------------------


def cpu_flags(text: str) -> list[str]:
    """Returns the flags of the first core in the text of /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return found[1].split() if found else []


def usable_cpus() -> int:
    """Returns the number of CPUs in this process's affinity mask."""
    return len(os.sched_getaffinity(0))


def total_memory() -> int:
    """Returns the host's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory(text: str) -> dict[str, int]:
    """Returns the sizes in the text of /proc/meminfo, in bytes."""
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def limits(text: str, root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """Returns the tightest limits of the groups in the text of /proc/self/cgroup and their ancestors, for cgroups v1
    and v2.

    In a container a group's path may be the host's, which does not exist there; the root's limits then apply.
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
    """Yields the listening sockets in the text of /proc/net/tcp."""
    for line in text.splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            yield Socket(int(words[1].rsplit(":", 1)[1], 16), int(words[7]), words[9])


def taken(ports: Mapping[str, Any], own: set[int]) -> list[dict[str, Any]]:
    """Returns those of the ports (name to number or from-to) on which a process of a user not in `own` listens: name,
    port, and `by` and `pid` of the process, empty and 0 if they are not visible."""
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
    """Returns name and id of the process that holds a socket; empty and 0 if they are not visible."""
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
    """Returns the path itself or its nearest parent that is an existing folder, as far as this user can see."""
    folder = Path(path)
    return next(one for one in (folder, *folder.parents) if _is_folder(one))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # below another user's folder
        return False


def free_disk(path: str | Path) -> int:
    """Returns the bytes that this user can still write at the path, existing or not."""
    return shutil.disk_usage(existing(path)).free


def shared_memory() -> int:
    """Returns the size of shared memory in bytes."""
    return shutil.disk_usage(SHARED_MEMORY).total


def mount_of(path: Path, text: str) -> Mount:
    """Returns the file system of an absolute path, from the text of /proc/self/mountinfo."""
    found = Mount("/", "", "")
    for line in text.splitlines():
        place, _, rest = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), place.split()[4])
        if len(point) >= len(found.point) and (path == Path(point) or Path(point) in path.parents):
            found = Mount(point, *rest.split()[:2])
    return found


def filesystems() -> list[str]:
    """Returns those of nfs and nfsd that the kernel supports, built in, loaded or as modules."""
    modules = Path("/lib/modules") / os.uname().release
    text = read("/proc/filesystems") + read(modules / "modules.dep") + read(modules / "modules.builtin")
    return [name for name in ("nfs", "nfsd") if re.search(rf"\b{name}$|/{name}\.ko", text, re.M)]


# Programs and the clock -----------------------------------------------------------------------------------------------


def interpreter(candidates: Sequence[str]) -> dict[str, Any]:
    """Returns path and version of the first candidate that runs; if none does, the first candidate and an empty
    version."""
    for path in candidates:
        try:
            line = [path, "-c", "import json, sys; print(json.dumps(sys.version_info[:3]))"]
            done = subprocess.run(line, capture_output=True, timeout=30, check=True)
            return {"path": path, "version": json.loads(done.stdout)}
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
    return {"path": candidates[0] if candidates else "", "version": []}


def clock_synchronised() -> bool | None:
    """Returns whether the kernel's clock is synchronised, according to adjtimex(2); None if that is not permitted."""
    state = ctypes.create_string_buffer(512)  # struct timex with modes 0, which only reads
    if ctypes.CDLL(None).adjtimex(state) < 0:
        return None
    # `status` follows modes and four longs.
    status = ctypes.c_int.from_buffer(state, 5 * ctypes.sizeof(ctypes.c_long)).value
    return not status & 0x40  # STA_UNSYNC
