"""The queue of finetunes in the background, as it lies on disk: `.queue` of the runs' folder.

Of each job there are its entry (JSON), its conf (YAML), what its process says (log), and a lock that this process holds
as long as it lives. `llm_ray.app.jobs` submits and shows, `llm_ray.app.job_process` takes its turn.
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
"""What a job's process says, in the folder of its run, once it has one."""
_LOCK_SECONDS = 1.0  # who looks at the queue holds a lock for a moment
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Entry:
    """What the queue's file of a job holds."""

    number: int
    """When it came, in nanoseconds since 1970."""
    by: str
    since: str
    command: str
    at_once: int
    started: bool = False
    reason: str = ""
    """Why it failed before there was a run."""
    serve_as: str = ""
    home: str = ""
    urgent: bool = False
    boot: str = ""
    """The host, and its start, in which the job's process was begun."""


def boot() -> str:
    """This host and its start: another after a restart of the machine."""
    return f"{socket.gethostname()} {_BOOT_ID.read_text(encoding='ascii').strip()}"


def entries(folder: Path) -> dict[str, Entry]:
    """Those of all jobs by name, as they came."""
    found = {}
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # taken away meanwhile, or of another version
            found[file.stem] = Entry(**json.loads(file.read_text(encoding="utf-8")))
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def write_entry(folder: Path, name: str, entry: Entry) -> None:
    """Whoever calls holds the queue's lock."""
    write_json(folder / f"{name}.json", asdict(entry))


def in_order(entries: dict[str, Entry], alive: Set[str]) -> list[str]:
    """Those that have started, then those that wait, in the order in which they begin: urgent ones first, then by how
    many of the same person's go before it, then as they came."""
    before: Counter[str] = Counter()
    order: dict[str, tuple[bool, bool, int]] = {}  # and among equals, as they came
    for name, entry in entries.items():
        order[name] = (not entry.started, not entry.urgent, before[entry.by] if not entry.started else 0)
        before[entry.by] += name in alive
    return sorted(entries, key=order.__getitem__)


def remove(folder: Path, name: str) -> None:
    """Take a job's files away, but for its lock: one who has opened it would lock a file that nobody else sees."""
    for suffix in ("json", "yaml", "log"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: Path, name: str) -> Iterator[IO[bytes] | None]:
    """The opened lock of a job, held as long as a process has it open; None where another process holds it."""
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
    """Whether a process waits, works, or is still ending as this job."""
    with contextlib.suppress(FileNotFoundError), (folder / f"{name}.lock").open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
