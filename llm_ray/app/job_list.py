"""Lists jobs, queued and ended, and follows their logs.

overview(runs)                       # running, waiting and ended jobs
for text in log_of(runs, "support-bot"):
    print(text, end="")              # until the job ends
"""

from __future__ import annotations

import codecs
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_ray.app.job_queue import LOG
from llm_ray.app.jobs import cancel, has_process, log_file, queue
from llm_ray.app.runs import stop_run
from llm_ray.errors import RunError
from llm_ray.nearest import nearest_names
from llm_ray.runs.listing import list_runs

_LOOK = 0.5  # seconds between two reads of a log
_BEFORE = 4096  # bytes of existing log to show first


@dataclass(frozen=True)
class JobSummary:
    """A job for display. `state` is waiting, starting, running, or the state of its ended run (done, failed, stopped,
    interrupted, damaged); `ahead` is its number of predecessors in the queue; `since` is the time of submission or of
    the run's start (ISO 8601)."""

    name: str
    state: str
    ahead: int
    by: str
    since: str
    reason: str


def overview(runs: Path) -> list[JobSummary]:
    """Returns the queue in order, then ended jobs, latest first."""
    if not runs.is_dir():
        return []
    queued = [JobSummary(job.name, job.state, job.ahead, job.by, job.since, job.reason) for job in queue(runs)]
    known = {job.name for job in queued}
    ended = [
        JobSummary(run.name, run.state, 0, "", run.created or "", run.reason)
        for run in list_runs(runs)
        if run.name not in known and (runs / run.name / LOG).is_file()
    ]
    return [*queued, *ended]


def find(runs: Path, name: str) -> JobSummary:
    """Returns the job `name`. Raises RunError if it does not exist."""
    found = {job.name: job for job in overview(runs)}
    if name in found:
        return found[name]
    near = nearest_names(name, found, 3)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    raise RunError(f"no job {name} in {runs}{hint} (llm-ray jobs list; runs of the command line: llm-ray runs list)")


def end(runs: Path, name: str) -> str:
    """Removes a waiting job from the queue, or asks a running one to stop with a checkpoint; returns a message about
    what was done. Raises RunError if the job has ended or is starting."""
    job = find(runs, name)
    if job.state not in ("waiting", "starting", "running", "failed"):
        raise RunError(f"the job {name} is {job.state}: there is nothing to cancel")
    if job.state in ("waiting", "failed"):
        cancel(runs, name)
        return "taken out of the queue"
    if job.state == "starting":
        raise RunError(f"the job {name} is starting: cancel it in a moment")
    stop_run(runs, name)
    return "asked to stop after its step; llm-ray jobs resume continues it"


def log_of(runs: Path, name: str) -> Iterator[str]:
    """Yields the end of the job's log, then new text until the job ends. Raises RunError if there is no such job."""
    find(runs, name)
    file, offset, decoder = None, 0, codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        alive = has_process(runs, name)  # checked first, so that the last output is still read
        now = log_file(runs, name)
        with contextlib.suppress(OSError), now.open("rb") as stream:
            if now != file:  # the run has begun and has its own log
                file, offset = now, max(0, stream.seek(0, os.SEEK_END) - _BEFORE)
            stream.seek(offset)
            data = stream.read()
            offset += len(data)
            if text := decoder.decode(data):
                yield text
        if not alive:
            return
        time.sleep(_LOOK)
