"""The process of a background finetune (llm_ray/cli/job.py): waits for its turn, then runs.

command = wait_for_turn(runs, "support-bot")
code = run(runs, "support-bot", reporter)
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from llm_ray.app.job_queue import LOG, QUEUE, Entry, entries, in_order, is_held, remove, write_entry
from llm_ray.errors import LlmRayError, Stopped
from llm_ray.files import locked
from llm_ray.progress import Reporter
from llm_ray.runs.folder import CONF, LOCK, RUN, RunFolder, holder

_POLL = 0.5  # seconds


def wait_for_turn(runs: Path, name: str) -> str | None:
    """Waits until it is the finetune's turn; returns the equivalent command line, or None if the job was cancelled."""
    while not (turn := _turn(runs, name)):
        if turn is None:
            return None
        time.sleep(_POLL)
    (runs / name).mkdir(exist_ok=True)
    return entries(runs / QUEUE)[name].command


def _turn(runs: Path, name: str) -> bool | None:
    """Returns whether it is this job's turn, and marks it as started if so; None if it was cancelled."""
    folder = runs / QUEUE
    with locked(folder / ".lock"):
        queued = entries(folder)
        own = queued.get(name)
        if own is None:
            return None
        alive = {other for other in queued if other == name or is_held(folder, other)}
        if next(other for other in in_order(queued, alive) if other in alive and not queued[other].started) != name:
            return False
        busy = {other for other in alive if queued[other].started} | _at_work(runs)
        if len(busy) >= own.at_once:
            return False
        write_entry(folder, name, replace(own, started=True))
        return True


def _at_work(runs: Path) -> set[str]:
    """Returns the runs with an active process on this machine, including those of the command line."""
    here = socket.gethostname()
    return {
        path.parent.name
        for path in runs.glob(f"*/{RUN}")
        if (found := holder(path.parent)) is not None and found.get("host") == here
    }


def run(runs: Path, name: str, reporter: Reporter) -> int:
    """Runs the finetune `name`, whose turn it is; returns the exit code. Errors are reported to `reporter`, and stored
    for `queue` if no run has begun."""
    from llm_ray.app.finetune import run_finetune
    from llm_ray.conf.load import load_finetune

    folder = runs / QUEUE
    entry = entries(folder)[name]
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
                remove(folder, name)
            else:
                _remove_unbegun(runs / name)
                write_entry(folder, name, replace(entry, reason=reason))
    return code


def _remove_unbegun(folder: Path) -> None:
    """Deletes the files of a run that has not begun. The folder stays if it holds other files."""
    for name in (LOG, LOCK, CONF):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _serve(run: Path, entry: Entry, reporter: Reporter) -> None:
    """Deploys the run's model on this machine's endpoint and records the outcome. A failed deployment does not fail the
    finetune."""
    from llm_ray.app.serving import serve_run

    try:
        how, served = serve_run(run.name, entry.serve_as, Path(entry.home), reporter), True
    except LlmRayError as error:
        how, served = str(error), False
        reporter.line(f"{entry.serve_as} is not served: {error}", kind="warning")
    at = datetime.now(UTC).isoformat(timespec="seconds")
    RunFolder(run).record(served={"name": entry.serve_as, "served": served, "how": how, "at": at})
