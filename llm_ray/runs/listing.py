"""Lists the runs of a folder with state, progress and latest figures.

for run in list_runs(home() / "runs"):
    print(run.name, run.state, run.loss)
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_ray.errors import RunError
from llm_ray.nearest import nearest_names
from llm_ray.runs.folder import RUN, RunFolder, holder, stored_conf
from llm_ray.runs.metrics import METRICS, read_metrics

TAIL = 1000
"""Number of last steps that a listing reads, so that long runs list quickly."""


@dataclass(frozen=True)
class RunSummary:
    """A run for display. `state` is running, done, failed, stopped, interrupted (no process holds its lock) or damaged
    (a file cannot be read; `reason` names it). Losses and tokens per second (excluding padding, all workers) are None
    until measured."""

    name: str
    path: str
    state: str
    reason: str
    base: str | None
    objective: str | None
    method: str | None
    step: int
    total_steps: int | None
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    created: str | None
    updated: str | None


def list_runs(runs: Path) -> list[RunSummary]:
    """Returns the runs under `runs`, latest first."""
    return sorted(map(summary, run_folders(runs)), key=lambda run: (run.created or "", run.name), reverse=True)


def find_run(runs: Path, name: str) -> Path:
    """Returns the folder of the run `name`. Raises RunError, with similar names, if it does not exist."""
    path = runs / name
    if path.parent == runs and (path / RUN).is_file():
        return path
    known = sorted(path.name for path in run_folders(runs))
    if not known:
        raise RunError(f"no run {name}: {runs} contains no runs (choose another folder with --runs)")
    nearest = nearest_names(name, known, 3)
    hint = (
        f"did you mean {' or '.join(nearest)}?"
        if nearest
        else f"there are {', '.join(known[:10])}{' …' if len(known) > 10 else ''}"
    )
    raise RunError(f"no run {name} in {runs}; {hint}")


def run_folders(runs: Path) -> list[Path]:
    """Returns the folders of all runs, without those being deleted, whose names are hidden."""
    return (
        [path for path in runs.iterdir() if (path / RUN).is_file() and not path.name.startswith(".")]
        if runs.is_dir()
        else []
    )


def summary(path: Path) -> RunSummary:
    """Returns the summary of the run in `path`; never raises for a damaged run."""
    try:
        lineage, result, problem = RunFolder(path).lineage(), RunFolder(path).result(), None
    except RunError as error:
        lineage, result, problem = {}, {}, str(error)
    try:
        conf: dict[str, Any] = stored_conf(path)
    except RunError as error:
        conf, problem = {}, problem or str(error)
    rows = read_metrics(path / METRICS, last=TAIL)
    steps = [row for row in rows if "loss" in row]
    last: dict[str, Any] = steps[-1] if steps else {}
    validations = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    state = lineage.get("state", "interrupted")
    return RunSummary(
        name=path.name,
        path=str(path),
        state="damaged" if problem else "interrupted" if state == "running" and holder(path) is None else state,
        reason=problem or lineage.get("reason", ""),
        base=conf.get("model", {}).get("base"),
        objective=conf.get("tuning", {}).get("objective"),
        method=conf.get("tuning", {}).get("method"),
        step=last.get("step", 0),
        total_steps=last.get("total_steps"),
        loss=last.get("loss"),
        validation_loss=validations[-1] if validations else result.get("training", {}).get("best_validation_loss"),
        tokens_per_second=rate(steps),
        created=lineage.get("created"),
        updated=lineage.get("updated"),
    )


def rate(steps: list[dict[str, Any]]) -> float | None:
    """Returns tokens per second over these steps; None without steps."""
    seconds = sum(row["seconds"] for row in steps)
    return sum(row["tokens"] for row in steps) / seconds if seconds else None


def age(when: str | None) -> str:
    """Returns the time since `when` (ISO 8601) in its largest unit."""
    if not when:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
