"""Background finetunes: each in its own process (`llm_ray.app.job_process`), which outlives its caller, one at a time
on this machine.

They begin in the order in which they came; but urgent ones before others, and of someone who has several, the second
after everybody's first, and so on.

job = submit(conf)          # waits for its turn, and runs
queue(conf.paths.runs)      # found again by any process, from files and the locks of those that work
cancel(conf.paths.runs, "support-bot")
recover(conf.paths.runs)    # those that a restart of the machine has ended go on

A run that has begun is a run like others: `llm_ray.app.runs` shows it, and stops it. What its process says is in
`finetune.log` of its folder. Of a waiting one there is what `llm_ray.app.job_queue` keeps.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from llm_ray.app.job_queue import LOG, QUEUE, Entry, boot, entries, hold, in_order, is_held, remove, write_entry
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.load import dump, load_finetune
from llm_ray.errors import LlmRayError, RunError
from llm_ray.files import locked, write_text
from llm_ray.models.load import find_base
from llm_ray.runs.folder import RUN, RunFolder, holder, refuse_other_conf, stored_conf
from llm_ray.train.fits import check_fits

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
    RunError where the run is waiting or running (Busy), or was made with another conf; ConfError, ModelError and
    ClusterError for what this machine can never run.
    """
    runs, name = conf.paths.runs, conf.name
    folder = runs / QUEUE
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_conf(conf, conf.run_dir)
    check_fits(conf, find_base(conf.model, conf.paths))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = Entry(time.time_ns(), by, now, command, at_once)
    if service:
        entry = replace(
            entry, number=service.arrived, serve_as=service.serve_as, home=str(service.home), urgent=service.urgent
        )
    _begin(conf, entry, detached=service is not None)
    return next((job for job in queue(runs) if job.name == name), Job(name, "starting", by, now, 0, ""))


def _begin(conf: FinetuneConf, entry: Entry, *, detached: bool = False) -> None:
    """Put a job into the queue, and begin its process. Raises RunError where it has one."""
    runs, name = conf.paths.runs, conf.name
    folder = runs / QUEUE
    with hold(folder, name) as lock:
        if lock is None:
            raise Busy(f"{name} is already waiting or running: use another name, or stop that run first")
        if holder(conf.run_dir) is not None:
            raise RunError(f"the run {name} is active: wait for it, stop it, or use another name")
        with locked(folder / ".lock"):
            write_text(folder / f"{name}.yaml", dump(conf), mode=0o600 if detached else 0o666)
            write_entry(folder, name, replace(entry, boot=boot()))
        _start_process(runs, name, lock, detached=detached)


def _start_process(runs: Path, name: str, lock: IO[bytes], *, detached: bool) -> None:
    with (runs / QUEUE / f"{name}.log").open("wb") as log:
        if detached:
            os.fchmod(log.fileno(), 0o600)
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "llm_ray.cli.job"),
                *(str(runs), name, str(lock.fileno()), *(["detached"] if detached else [])),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # signals to this process's group or terminal are not meant for it
            pass_fds=[lock.fileno()],  # with the lock: there is no moment in which nobody holds it
            cwd=runs,
            umask=0o077 if detached else -1,
        )
    threading.Thread(target=process.wait, daemon=True).start()  # else it stays as a zombie


def recover(runs: Path) -> list[str]:
    """Have the jobs of this user go on, each in its place, whose processes a restart of this machine has ended: those
    that waited wait again, and those that ran resume from their last checkpoints. Returns their names.

    Jobs of a service are its own matter, and a job whose process alone was killed stays as it is.
    """
    folder = runs / QUEUE
    host = boot().partition(" ")[0]
    found = []
    for name, entry in entries(folder).items():
        restarted = entry.boot.partition(" ")[0] == host and entry.boot != boot()
        if not restarted or entry.serve_as or entry.reason or is_held(folder, name):
            continue
        with contextlib.suppress(OSError, LlmRayError):  # another user's, or taken away, or begun by another meanwhile
            if (folder / f"{name}.json").stat().st_uid != os.geteuid():
                continue
            if (
                entry.started
                and (runs / name / RUN).is_file()
                and RunFolder(runs / name).lineage()["state"] != "running"
            ):
                forget(runs, name)  # the command line has gone on with it
                continue
            _begin(load_finetune(folder / f"{name}.yaml"), replace(entry, started=False))
            found.append(name)
    return found


def resume(runs: Path, name: str, *, by: str = "") -> Job:
    """Have the run `name` go on, from its last checkpoint, with the conf that it was made with. Raises RunError."""
    conf = FinetuneConf.model_validate(stored_conf(runs / name))
    return submit(conf, by=by, command=f"llm-ray finetune --config {runs / name / 'conf.yaml'}")


def queue(runs: Path) -> list[Job]:
    """The finetunes that were asked for with `submit` and wait, run, or have failed before there was a run; in their
    order."""
    folder = runs / QUEUE
    jobs: list[Job] = []
    found = entries(folder)
    held = {name for name in found if is_held(folder, name)}
    for name in in_order(found, held):
        entry, alive = found[name], name in held
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
    folder = runs / QUEUE
    with locked(folder / ".lock"):
        entry = entries(folder).get(name)
        if entry is None:
            raise RunError(f"{name} is not in the queue: there is nothing to cancel")
        if entry.started and is_held(folder, name):
            raise RunError(f"{name} has already started: stop it instead")
        remove(folder, name)


def forget(runs: Path, name: str) -> None:
    """Take what the queue still knows of a run that is deleted out of it."""
    with locked(runs / QUEUE / ".lock"):
        if not is_held(runs / QUEUE, name):
            remove(runs / QUEUE, name)


def has_process(runs: Path, name: str) -> bool:
    """Whether a process waits, works, or is still ending as the job `name`."""
    return is_held(runs / QUEUE, name)


def log_file(runs: Path, name: str) -> Path:
    """Where the finetune's process says what it does; there may be nothing yet."""
    own = runs / name / LOG
    return own if own.exists() else runs / QUEUE / f"{name}.log"


def read_log(runs: Path, name: str, last: int = 1 << 16) -> str:
    """The last bytes of what the finetune's process has said; empty where there is nothing."""
    with contextlib.suppress(OSError), log_file(runs, name).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - last))
        text = stream.read().decode(errors="replace")
        return text if size <= last else text.partition("\n")[2]
    return ""
