"""Lists, shows, compares, stops and deletes runs.

runs = home() / "runs"
stop_run(runs, "support-bot", wait=600)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.app.job_queue import LOG
from llm_ray.app.jobs import forget
from llm_ray.errors import RunError
from llm_ray.runs import folder
from llm_ray.runs.benchmarks import label, whole
from llm_ray.runs.compare import Comparison, compare, png_plot, terminal_plot
from llm_ray.runs.folder import RUN, RunFolder, ask_to_stop, holder, stored_conf
from llm_ray.runs.listing import RunSummary, age, find_run, list_runs, rate, run_folders, summary
from llm_ray.runs.metrics import METRICS, read_metrics

__all__ = [
    "Comparison",
    "RunDetails",
    "RunSummary",
    "age",
    "compare_runs",
    "delete_run",
    "find_run",
    "label",
    "list_runs",
    "metrics",
    "png_plot",
    "rate",
    "seconds_left",
    "show_run",
    "stamp",
    "stop_run",
    "terminal_plot",
    "watch_runs",
    "whole",
]

_POLL = 0.2  # seconds


@dataclass(frozen=True)
class RunDetails:
    """All details of a run. The dicts are the contents of its files (docs/reference/run-folder.md)."""

    summary: RunSummary
    conf: dict[str, Any]
    lineage: dict[str, Any]
    result: dict[str, Any]
    params: dict[str, Any]
    """Empty before training."""
    output: Path | None
    """Folder of the exported model; None before export."""


def show_run(runs: Path, name: str) -> RunDetails:
    """Returns the details of the run `name`. Raises RunError if it does not exist or is damaged."""
    path = find_run(runs, name)
    found = summary(path)
    if found.state == "damaged":
        raise RunError(f"the run {name} is damaged: {found.reason}")
    run, output = RunFolder(path), path / "output"
    return RunDetails(
        found, stored_conf(path), run.lineage(), run.result(), run.params(), output if output.is_dir() else None
    )


def compare_runs(runs: Path, names: Sequence[str], metric: str = "loss") -> Comparison:
    """Compares runs, with their curves of `metric`. Raises RunError."""
    return compare([find_run(runs, name) for name in dict.fromkeys(names)], metric)


def stop_run(runs: Path, name: str, wait: float = 0.0) -> RunSummary:
    """Asks the run `name` to stop, from any process that sees the folder `runs`; returns its summary.

    Training stops after its current step, with a checkpoint; any other stage is completed, and the next one does not
    begin. The same finetune continues from there. `wait` is the time to wait for the end, in seconds. Raises RunError
    if no process works on the run, or if it has not stopped within a nonzero `wait`; the request then still stands.
    """
    path = find_run(runs, name)
    ask_to_stop(path)
    until = time.monotonic() + wait
    while holder(path) is not None and time.monotonic() < until:
        time.sleep(_POLL)
    if wait and holder(path) is not None:
        raise RunError(
            f"the run {name} has not stopped within {wait:.0f} s; it will stop after its current step or stage"
        )
    return summary(path)


def delete_run(runs: Path, name: str) -> None:
    """Deletes the run `name` with its checkpoints, metrics and model. Raises RunError if it does not exist or a process
    works on it."""
    folder.delete_run(find_run(runs, name))
    forget(runs, name)


def metrics(runs: Path, name: str) -> list[dict[str, Any]]:
    """Returns the rows of the run's metrics.jsonl, one per step; empty before training. Raises RunError if there is no
    such run."""
    return read_metrics(find_run(runs, name) / METRICS)


def stamp(runs: Path, name: str) -> tuple[int, ...]:
    """Returns numbers that change whenever the displayed state of the run changes. Cheap: it only stats a few files."""
    files = [runs / name / file for file in (METRICS, RUN, LOG)]
    found = [file.stat() if file.exists() else None for file in files]
    written = tuple(number for one in found for number in ((one.st_mtime_ns, one.st_size) if one else (0, 0)))
    return (*written, holder(runs / name) is not None)  # a killed run writes nothing


def watch_runs(runs: Path) -> list[RunSummary]:
    """Like `list_runs`, for polling: unchanged runs are not read again."""
    found = [_summary_at(path, stamp(runs, path.name)) for path in run_folders(runs)]
    return sorted(found, key=lambda run: (run.created or "", run.name), reverse=True)


@functools.lru_cache(maxsize=1024)
def _summary_at(path: Path, at: tuple[int, ...]) -> RunSummary:
    return summary(path)


def seconds_left(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Estimates the remaining training time in seconds from the last 20 steps; None if it is unknown."""
    steps = [row for row in rows if "loss" in row][-20:]
    if not steps or not steps[-1].get("total_steps"):
        return None
    return float((steps[-1]["total_steps"] - steps[-1]["step"]) * sum(row["seconds"] for row in steps) / len(steps))
