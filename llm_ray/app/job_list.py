"""Jobs for those who look at them: what is in the queue of `llm_ray.app.jobs`, and what has come of the others.

overview(runs)                       # what runs, what waits, what has ended
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

_LOOK = 0.5  # seconds between two looks at a log
_BEFORE = 4096  # bytes of a log that is followed, of what was there before


@dataclass(frozen=True)
class JobSummary:
    """A job in a line. `state`: waiting, starting, running, or what its run came to (done, failed, stopped, interrupted,
    damaged); `ahead`: how many go before it; `since`: when it was submitted, or its run began (ISO 8601)."""

    name: str
    state: str
    ahead: int
    by: str
    since: str
    reason: str


def overview(runs: Path) -> list[JobSummary]:
    """The queue in its order, then what has ended, the latest first."""
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
    """The job `name`. Raises RunError where there is none."""
    found = {job.name: job for job in overview(runs)}
    if name in found:
        return found[name]
    near = nearest_names(name, found, 3)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    raise RunError(f"no job {name} in {runs}{hint} (llm-ray jobs list; runs of the command line: llm-ray runs list)")


def end(runs: Path, name: str) -> str:
    """Take a job out of the queue, or ask its training to end with a checkpoint; returns what was done, in words. Raises
    RunError where it has ended."""
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
    """The end of the job's log, and what is added to it until the job ends. Raises RunError where there is no job."""
    find(runs, name)
    file, offset, decoder = None, 0, codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        alive = has_process(runs, name)  # before its last words are read
        now = log_file(runs, name)
        with contextlib.suppress(OSError), now.open("rb") as stream:
            if now != file:  # the run has begun, and has a log of its own
                file, offset = now, max(0, stream.seek(0, os.SEEK_END) - _BEFORE)
            stream.seek(offset)
            data = stream.read()
            offset += len(data)
            if text := decoder.decode(data):
                yield text
        if not alive:
            return
        time.sleep(_LOOK)
