"""Background finetunes: each in its own process, which outlives its caller, one at a time on this machine.

They begin in the order in which they came; but urgent ones before others, and of someone who has several, the second
after everybody's first, and so on.

job = submit(conf)          # waits for its turn, and runs
queue(conf.paths.runs)      # found again by any process, from files and the locks of those that work
cancel(conf.paths.runs, "support-bot")

A run that has begun is a run like others: `llm_ray.app.runs` shows it, and stops it. What its process says is in
`finetune.log` of its folder. Of a waiting one there is a file under `.queue` of the runs' folder, and a process that
holds its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.load import dump
from llm_ray.errors import LlmRayError, RunError, Stopped
from llm_ray.files import locked, write_json, write_text
from llm_ray.progress import Reporter
from llm_ray.runs.folder import CONF, LOCK, RUN, RunFolder, holder, refuse_other_conf, stored_conf

LOG = "finetune.log"
_QUEUE = ".queue"
_POLL = 0.5  # seconds
_LOCK_SECONDS = 1.0  # who looks at the queue holds a lock for a moment

State = Literal["waiting", "starting", "running", "failed"]


class Busy(RunError):
    """The process of a finetune of this name has not ended yet."""


@dataclass(frozen=True)
class Job:
    """A finetune that waits, runs, or has failed before there was a run."""

    name: str
    state: State
    by: str
    """Who asked for it."""
    since: str
    """When (ISO 8601)."""
    ahead: int
    """How many go before it."""
    reason: str
    """Why it failed."""
    killed: bool = False
    """Whether it failed because its process was ended: submitted again, it goes on."""


@dataclass(frozen=True)
class _Entry:
    """What the queue's file of a job holds."""

    number: int
    by: str
    since: str
    command: str
    at_once: int
    started: bool = False
    reason: str = ""
    serve_as: str = ""
    home: str = ""
    urgent: bool = False


@dataclass(frozen=True)
class Service:
    """What a job of a service is beside a finetune: its run is open to this user alone, it outlives the process that asks
    for it even where that process ends its children, and its model is served when it is there."""

    serve_as: str
    """The name under which this machine's endpoint serves it."""
    home: Path
    """The folder of models, data and runs, by which the endpoint is found."""
    arrived: int
    """Its place among the others: when it was asked for first, in nanoseconds since 1970."""
    urgent: bool = False
    """Whether it goes before those that are not."""


def submit(
    conf: FinetuneConf, *, by: str = "", command: str = "", at_once: int = 1, service: Service | None = None
) -> Job:
    """Have the finetune of `conf` run in the background, after those that wait already and when fewer than `at_once`
    run on this machine.

    A run of that name that was broken off is gone on with. `command` is the command line that does the same. Raises
    RunError where the run is waiting or running (Busy), or was made with another conf; ConfError.
    """
    runs, name = conf.paths.runs, conf.name
    folder = runs / _QUEUE
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_conf(conf, conf.run_dir)
    with _lock(folder / f"{name}.lock") as lock:
        if lock is None:
            raise Busy(f"{name} is already waiting or running: use another name, or stop that run first")
        if holder(conf.run_dir) is not None:
            raise RunError(f"the run {name} is active: wait for it, stop it, or use another name")
        with locked(folder / ".lock"):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            entry = _Entry(time.time_ns(), by, now, command, at_once)
            if service:
                entry = replace(
                    entry,
                    number=service.arrived,
                    serve_as=service.serve_as,
                    home=str(service.home),
                    urgent=service.urgent,
                )
            write_text(folder / f"{name}.yaml", dump(conf), mode=0o600 if service else 0o666)
            write_json(folder / f"{name}.json", asdict(entry))
        with (folder / f"{name}.log").open("wb") as log:
            if service:
                os.fchmod(log.fileno(), 0o600)
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "llm_ray.cli.job"),
                    *(str(runs), name, str(lock.fileno()), *(["detached"] if service else [])),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals to this process's group or terminal are not meant for it
                pass_fds=[lock.fileno()],  # with the lock: there is no moment in which nobody holds it
                cwd=runs,
                umask=0o077 if service else -1,
            )
    threading.Thread(target=process.wait, daemon=True).start()  # else it stays as a zombie
    return next((job for job in queue(runs) if job.name == name), Job(name, "starting", by, now, 0, ""))


def resume(runs: Path, name: str, *, by: str = "") -> Job:
    """Have the run `name` go on, from its last checkpoint, with the conf that it was made with. Raises RunError."""
    conf = FinetuneConf.model_validate(stored_conf(runs / name))
    return submit(conf, by=by, command=f"llm-ray finetune --config {runs / name / 'conf.yaml'}")


def queue(runs: Path) -> list[Job]:
    """The finetunes that were asked for with `submit` and wait, run, or have failed before there was a run; in their
    order."""
    folder = runs / _QUEUE
    jobs: list[Job] = []
    entries = _entries(folder)
    held = {name for name in entries if _held(folder / f"{name}.lock")}
    for name in _in_order(entries, held):
        entry, alive = entries[name], name in held
        if not alive and (runs / name / RUN).is_file() and entry.started:
            continue  # an ended run, which says so itself
        ahead = sum(job.state != "failed" for job in jobs)
        if not alive:
            reason = entry.reason or "its process has ended (was it killed, or the machine restarted?): start it again"
            jobs.append(Job(name, "failed", entry.by, entry.since, 0, reason, killed=not entry.reason))
        elif entry.started:
            state: State = "running" if holder(runs / name) is not None else "starting"
            jobs.append(Job(name, state, entry.by, entry.since, 0, ""))
        else:
            jobs.append(Job(name, "waiting", entry.by, entry.since, ahead, ""))
    return jobs


def cancel(runs: Path, name: str) -> None:
    """Take a finetune that waits, or has failed before there was a run, out of the queue. Raises RunError where it is
    not in it, or runs."""
    folder = runs / _QUEUE
    with locked(folder / ".lock"):
        entry = _entries(folder).get(name)
        if entry is None:
            raise RunError(f"{name} is not in the queue: there is nothing to cancel")
        if entry.started and _held(folder / f"{name}.lock"):
            raise RunError(f"{name} has already started: stop it instead")
        _remove(folder, name)


def forget(runs: Path, name: str) -> None:
    """Take what the queue still knows of a run that is deleted out of it."""
    with locked(runs / _QUEUE / ".lock"):
        if not _held(runs / _QUEUE / f"{name}.lock"):
            _remove(runs / _QUEUE, name)


def has_process(runs: Path, name: str) -> bool:
    """Whether a process waits, works, or is still ending as the job `name`."""
    return _held(runs / _QUEUE / f"{name}.lock")


def log_file(runs: Path, name: str) -> Path:
    """Where the finetune's process says what it does; there may be nothing yet."""
    own = runs / name / LOG
    return own if own.exists() else runs / _QUEUE / f"{name}.log"


def read_log(runs: Path, name: str, last: int = 1 << 16) -> str:
    """The last bytes of what the finetune's process has said; empty where there is nothing."""
    with contextlib.suppress(OSError), log_file(runs, name).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - last))
        text = stream.read().decode(errors="replace")
        return text if size <= last else text.partition("\n")[2]
    return ""


def _entries(folder: Path) -> dict[str, _Entry]:
    found = {}
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # taken away meanwhile, or of another version
            found[file.stem] = _Entry(**json.loads(file.read_text(encoding="utf-8")))
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def _in_order(entries: dict[str, _Entry], alive: Set[str]) -> list[str]:
    """Those that have started, then those that wait, in the order in which they begin: urgent ones first, then by how
    many of the same person's go before it, then as they came."""
    before: Counter[str] = Counter()
    order: dict[str, tuple[bool, bool, int]] = {}  # and among equals, as they came
    for name, entry in entries.items():
        order[name] = (not entry.started, not entry.urgent, before[entry.by] if not entry.started else 0)
        before[entry.by] += name in alive
    return sorted(entries, key=order.__getitem__)


def _remove(folder: Path, name: str) -> None:
    # The lock's file stays: one who has opened it would lock a file that nobody else sees.
    for suffix in ("json", "yaml", "log"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _remove_unbegun(folder: Path) -> None:
    """Take away what was made of a run that has not begun; the folder stays where it holds anything else, which was
    there before."""
    for name in (LOG, LOCK, CONF):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[IO[bytes] | None]:
    """The opened file with its lock, which lasts as long as a process has it open; None where another has it."""
    with file.open("ab") as stream:
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


def _held(file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# In the process of a finetune (llm_ray/cli/job.py) --------------------------------------------------------------------


def wait_for_turn(runs: Path, name: str) -> str | None:
    """Wait until it is the turn of the finetune `name`; returns the command line that does the same, None where it was
    cancelled."""
    while not (turn := _turn(runs, name)):
        if turn is None:
            return None
        time.sleep(_POLL)
    (runs / name).mkdir(exist_ok=True)
    return _entries(runs / _QUEUE)[name].command


def _turn(runs: Path, name: str) -> bool | None:
    """Whether it is this one's turn, which is then noted; None where it was cancelled."""
    folder = runs / _QUEUE
    with locked(folder / ".lock"):
        entries = _entries(folder)
        own = entries.get(name)
        if own is None:
            return None
        alive = {other for other in entries if other == name or _held(folder / f"{other}.lock")}
        if next(other for other in _in_order(entries, alive) if other in alive and not entries[other].started) != name:
            return False
        busy = {other for other in alive if entries[other].started} | _at_work(runs)
        if len(busy) >= own.at_once:
            return False
        write_json(folder / f"{name}.json", asdict(own) | {"started": True})
        return True


def _at_work(runs: Path) -> set[str]:
    """The runs that a process of this machine works in, those of the command line too."""
    here = socket.gethostname()
    return {
        path.parent.name
        for path in runs.glob(f"*/{RUN}")
        if (found := holder(path.parent)) is not None and found.get("host") == here
    }


def run(runs: Path, name: str, reporter: Reporter) -> int:
    """Run the finetune `name`, whose turn it is; returns the exit code. What goes wrong is told to `reporter` and kept
    for `queue`."""
    from llm_ray.app.finetune import run_finetune
    from llm_ray.conf.load import load_finetune

    folder = runs / _QUEUE
    entry = _entries(folder)[name]
    code, reason = 1, "its process was terminated"
    try:
        run_finetune(load_finetune(folder / f"{name}.yaml"), reporter)
        if entry.serve_as:
            _serve(runs / name, entry, reporter)
        code, reason = 0, ""
    except Stopped as error:
        code, reason = error.exit_code, str(error)
        reporter.line(reason)
    except LlmRayError as error:
        code, reason = error.exit_code, str(error)
        reporter.line(f"Error: {error}", kind="warning")
    finally:
        with locked(folder / ".lock"):
            if (runs / name / RUN).is_file():
                _remove(folder, name)
            else:
                _remove_unbegun(runs / name)
                write_json(folder / f"{name}.json", asdict(entry) | {"reason": reason})
    return code


def _serve(run: Path, entry: _Entry, reporter: Reporter) -> None:
    """Have this machine's endpoint serve the model of a run, and note how that went: that it is not served makes no
    failure of the finetune."""
    from llm_ray.app.serving import serve_run

    try:
        how, served = serve_run(run.name, entry.serve_as, Path(entry.home), reporter), True
    except LlmRayError as error:
        how, served = str(error), False
        reporter.line(f"{entry.serve_as} is not served: {error}", kind="warning")
    at = datetime.now(UTC).isoformat(timespec="seconds")
    RunFolder(run).record(served={"name": entry.serve_as, "served": served, "how": how, "at": at})
