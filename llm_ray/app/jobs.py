"""Background finetunes: each in its own process (`llm_ray.app.job_process`), which outlives its caller; by default one
runs at a time on this machine.

Jobs start in order of arrival, with two exceptions: urgent jobs go first, and a submitter's second job waits for the
first job of everyone else, and so on.

job = submit(conf)          # waits for its turn, then runs
queue(conf.paths.runs)      # any process can list the queue, from files and locks
cancel(conf.paths.runs, "support-bot")
recover(conf.paths.runs)    # restarts jobs that a reboot interrupted

A started job is a normal run: `llm_ray.app.runs` shows and stops it. The output of its process is `finetune.log` in the
run's folder. The files of a waiting job are described in `llm_ray.app.job_queue`.
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
    """A process for a finetune of this name still exists."""


@dataclass(frozen=True)
class Job:
    """A finetune that waits, runs, or failed before its run began."""

    name: str
    state: State
    by: str
    """Who submitted it."""
    since: str
    """Time of submission (ISO 8601)."""
    ahead: int
    """Number of jobs ahead of it."""
    reason: str
    """Why it failed."""
    killed: bool = False
    """Whether its process was killed; submitting it again continues it."""


@dataclass(frozen=True)
class Service:
    """Extra settings of a job submitted by a service: its files are private to this system user, its process survives
    even a caller that kills its children, and its model is deployed when finished."""

    serve_as: str
    """Name under which this machine's endpoint serves the model."""
    home: Path
    """The folder of models, data and runs; it locates the endpoint."""
    arrived: int
    """Position in the queue: time of the first submission, in nanoseconds since 1970."""
    urgent: bool = False
    """Whether the job goes ahead of those that are not urgent."""


def submit(
    conf: FinetuneConf, *, by: str = "", command: str = "", at_once: int = 1, service: Service | None = None
) -> Job:
    """Queues the finetune of `conf` to run in the background, after jobs already waiting and when fewer than `at_once`
    run on this machine.

    An interrupted run of the same name is continued. `command` is the equivalent command line. Raises RunError if the
    run is waiting or running (Busy) or was made with another conf, and ConfError, ModelError or ClusterError if this
    machine can never run it.
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
    """Adds a job to the queue and starts its process. Raises RunError if it already has one."""
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
            start_new_session=True,  # signals to the caller's group or terminal must not reach it
            pass_fds=[lock.fileno()],  # the process inherits the lock, so that it is never free in between
            cwd=runs,
            umask=0o077 if detached else -1,
        )
    threading.Thread(target=process.wait, daemon=True).start()  # reaps the process


def recover(runs: Path) -> list[str]:
    """Restarts this user's jobs that a reboot of this machine interrupted, with their positions in the queue: waiting
    jobs wait again, running ones resume from their last checkpoints. Returns their names.

    Jobs of a service are skipped, since the service recovers them; so are jobs whose process was killed without a
    reboot.
    """
    folder = runs / QUEUE
    now = boot()
    found = []
    for name, entry in entries(folder).items():
        restarted = entry.boot.partition(" ")[0] == now.partition(" ")[0] and entry.boot != now
        if not restarted or entry.serve_as or entry.reason or is_held(folder, name):
            continue
        with contextlib.suppress(OSError, LlmRayError):  # another user's, deleted, or restarted meanwhile
            if (folder / f"{name}.json").stat().st_uid != os.geteuid():
                continue
            if (
                entry.started
                and (runs / name / RUN).is_file()
                and RunFolder(runs / name).lineage()["state"] != "running"
            ):
                forget(runs, name)  # the run was finished or resumed from the command line
                continue
            _begin(load_finetune(folder / f"{name}.yaml"), replace(entry, started=False))
            found.append(name)
    return found


def resume(runs: Path, name: str, *, by: str = "") -> Job:
    """Queues the run `name` to continue from its last checkpoint with its stored conf. Raises RunError."""
    conf = FinetuneConf.model_validate(stored_conf(runs / name))
    return submit(conf, by=by, command=f"llm-ray finetune --config {runs / name / 'conf.yaml'}")


def queue(runs: Path) -> list[Job]:
    """Returns the submitted finetunes that wait, run, or failed before their run began, in queue order."""
    folder = runs / QUEUE
    jobs: list[Job] = []
    found = entries(folder)
    held = {name for name in found if is_held(folder, name)}
    for name in in_order(found, held):
        entry, alive = found[name], name in held
        if not alive and (runs / name / RUN).is_file() and entry.started:
            continue  # an ended run, which records its own state
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
    """Removes a finetune that waits, or failed before its run began, from the queue. Raises RunError if it is not in
    the queue or is running."""
    folder = runs / QUEUE
    with locked(folder / ".lock"):
        entry = entries(folder).get(name)
        if entry is None:
            raise RunError(f"{name} is not in the queue: there is nothing to cancel")
        if entry.started and is_held(folder, name):
            raise RunError(f"{name} has already started: stop it instead")
        remove(folder, name)


def forget(runs: Path, name: str) -> None:
    """Removes the queue's files of a deleted run."""
    with locked(runs / QUEUE / ".lock"):
        if not is_held(runs / QUEUE, name):
            remove(runs / QUEUE, name)


def has_process(runs: Path, name: str) -> bool:
    """Returns whether a process of the job waits, runs or is still ending."""
    return is_held(runs / QUEUE, name)


def log_file(runs: Path, name: str) -> Path:
    """Returns the path of the process's log, which may not exist yet."""
    own = runs / name / LOG
    return own if own.exists() else runs / QUEUE / f"{name}.log"


def read_log(runs: Path, name: str, last: int = 1 << 16) -> str:
    """Returns the last `last` bytes of the process's log, from a line's start; empty if there is no log."""
    with contextlib.suppress(OSError), log_file(runs, name).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - last))
        text = stream.read().decode(errors="replace")
        return text if size <= last else text.partition("\n")[2]
    return ""
