"""Runs: list, show, compare, stop and delete them.

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
]

_POLL = 0.2  # seconds


@dataclass(frozen=True)
class RunDetails:
    """All that is known of a run. The dicts are what its files hold (docs/reference/run-folder.md)."""

    summary: RunSummary
    conf: dict[str, Any]
    lineage: dict[str, Any]
    result: dict[str, Any]
    params: dict[str, Any]
    """Empty before training."""
    output: Path | None
    """The folder of the model, where there is one."""


def show_run(runs: Path, name: str) -> RunDetails:
    """The run `name` of the folder `runs`. Raises RunError where there is none, or where it is damaged."""
    path = find_run(runs, name)
    found = summary(path)
    if found.state == "damaged":
        raise RunError(f"the run {name} is damaged: {found.reason}")
    run, output = RunFolder(path), path / "output"
    return RunDetails(
        found, stored_conf(path), run.lineage(), run.result(), run.params(), output if output.is_dir() else None
    )


def compare_runs(runs: Path, names: Sequence[str], metric: str = "loss") -> Comparison:
    """Runs of the folder `runs` side by side, with their curves of `metric`. Raises RunError."""
    return compare([find_run(runs, name) for name in dict.fromkeys(names)], metric)


def stop_run(runs: Path, name: str, wait: float = 0.0) -> RunSummary:
    """Ask the run `name` to end, from any process that sees the folder `runs`; returns how it stands then.

    Training ends after its step, with a checkpoint; any other stage is completed first, and the next does not begin.
    The same finetune goes on from there. `wait`: seconds to wait for the end. Raises RunError where no process works in
    the run, and where it has not ended within `wait` (if that is not 0): it is still asked to.
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
    """Delete the run `name` with its checkpoints, metrics and model. Raises RunError where there is none, or a process
    works in it."""
    folder.delete_run(find_run(runs, name))
    forget(runs, name)


def metrics(runs: Path, name: str) -> list[dict[str, Any]]:
    """The rows of the run's metrics.jsonl, a step each; none before training. Raises RunError where there is no run."""
    return read_metrics(find_run(runs, name) / METRICS)


def stamp(runs: Path, name: str) -> tuple[int, ...]:
    """Numbers that change with what there is to show of the run `name`; they cost a look at some files."""
    files = [runs / name / file for file in (METRICS, RUN, LOG)]
    found = [file.stat() if file.exists() else None for file in files]
    written = tuple(number for one in found for number in ((one.st_mtime_ns, one.st_size) if one else (0, 0)))
    return (*written, holder(runs / name) is not None)  # a killed one writes nothing


def watch_runs(runs: Path) -> list[RunSummary]:
    """As `list_runs`, for who looks again and again: of runs that have not changed nothing is read."""
    found = [_summary_at(path, stamp(runs, path.name)) for path in run_folders(runs)]
    return sorted(found, key=lambda run: (run.created or "", run.name), reverse=True)


@functools.lru_cache(maxsize=1024)
def _summary_at(path: Path, at: tuple[int, ...]) -> RunSummary:
    return summary(path)


def seconds_left(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """About how long training goes on, from its last steps; None where that cannot be told."""
    steps = [row for row in rows if "loss" in row][-20:]
    if not steps or not steps[-1].get("total_steps"):
        return None
    return float((steps[-1]["total_steps"] - steps[-1]["step"]) * sum(row["seconds"] for row in steps) / len(steps))
