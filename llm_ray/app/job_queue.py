"""The on-disk queue of background finetunes: `.queue` in the runs' folder.

Each job has an entry (JSON), a conf (YAML), a log of its process, and a lock that this process holds while it lives.
`llm_ray.app.jobs` submits and lists jobs, `llm_ray.app.job_process` runs them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from llm_ray.files import write_json

QUEUE = ".queue"
LOG = "finetune.log"
"""Log of a job's process, in the run's folder once the run exists."""
_LOCK_SECONDS = 1.0  # readers of the queue hold a lock only briefly
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Entry:
    """The contents of a job's entry file."""

    number: int
    """Time of arrival, in nanoseconds since 1970."""
    by: str
    since: str
    command: str
    at_once: int
    started: bool = False
    reason: str = ""
    """Why the job failed before its run began."""
    serve_as: str = ""
    home: str = ""
    urgent: bool = False
    boot: str = ""
    """The `boot` value under which the job's process was started."""


def boot() -> str:
    """Returns an identifier of this host and its current boot; it changes with every reboot."""
    return f"{socket.gethostname()} {_BOOT_ID.read_text(encoding='ascii').strip()}"


def entries(folder: Path) -> dict[str, Entry]:
    """Returns the entries of all jobs by name, in order of arrival."""
    found = {}
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # deleted meanwhile, or written by another version
            found[file.stem] = Entry(**json.loads(file.read_text(encoding="utf-8")))
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def write_entry(folder: Path, name: str, entry: Entry) -> None:
    """Writes a job's entry. The caller must hold the queue's lock."""
    write_json(folder / f"{name}.json", asdict(entry))


def in_order(entries: dict[str, Entry], alive: Set[str]) -> list[str]:
    """Returns all jobs in order of execution: started jobs, then waiting ones. Waiting jobs are sorted by urgency, then
    by the number of earlier live jobs of the same submitter, then by arrival."""
    before: Counter[str] = Counter()
    order: dict[str, tuple[bool, bool, int]] = {}  # the sort is stable, so ties keep the order of arrival
    for name, entry in entries.items():
        order[name] = (not entry.started, not entry.urgent, before[entry.by] if not entry.started else 0)
        before[entry.by] += name in alive
    return sorted(entries, key=order.__getitem__)


def remove(folder: Path, name: str) -> None:
    """Deletes a job's files except the lock file: a process that has it open would otherwise lock an unlinked file."""
    for suffix in ("json", "yaml", "log"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: Path, name: str) -> Iterator[IO[bytes] | None]:
    """Yields the locked lock file of a job, or None if another process holds it. The lock lasts as long as any process
    has the file open."""
    with (folder / f"{name}.lock").open("ab") as stream:
        until = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield stream
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(0.02)
        yield None


def is_held(folder: Path, name: str) -> bool:
    """Returns whether a process of this job waits, runs or is still ending."""
    with contextlib.suppress(FileNotFoundError), (folder / f"{name}.lock").open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
