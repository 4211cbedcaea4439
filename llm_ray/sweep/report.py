"""Report of a sweep: a table of its trials, their curves, and the importance of each key; as text, Markdown, JSON and
PNG.

    report = make_report(folder)
    write_report(folder, report)     # report.md, report.json, curves.png, importance.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_ray.errors import RunError
from llm_ray.files import write_json, write_text
from llm_ray.runs.compare import Comparison, png_plot, terminal_plot
from llm_ray.sweep.folder import COLUMNS, SweepFolder, Trial, best_of
from llm_ray.sweep.search import show_value
from llm_ray.sweep.space import importance

_BAR = 40  # width in characters of the longest bar
_DRAWN = 8  # number of curves in the terminal, the best ones


@dataclass(frozen=True)
class Report:
    """The trials, best first, and the importance of each key, in descending order and summing to 1 (empty for too few
    trials). `held_out` has the figures of the base model and the best trial on rows not used for training or selection;
    empty before that evaluation."""

    name: str
    metric: str
    trials: list[Trial]
    best: Trial | None
    importance: dict[str, float]
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)

    def table(self) -> list[tuple[str, ...]]:
        """Returns the trials as rows of cells, preceded by a header row."""
        keys = list(self.trials[0].values) if self.trials else []
        head = ("trial", "state", self.metric, "trained", "seconds", *(key.rpartition(".")[2] for key in keys))
        rows = [
            (
                trial.name,
                trial.state if trial.state != "begun" else "interrupted",
                f"{trial.metric:.4f}" if trial.metric is not None else "",
                f"{trial.share:.0%}",
                f"{trial.seconds:.0f}",
                *(show_value(trial.values[key]) for key in keys),
            )
            for trial in self.trials
        ]
        return [head, *rows]

    def importance_lines(self) -> list[str]:
        """Returns each key with a bar."""
        width = max(map(len, self.importance), default=0)
        return [
            f"{key.ljust(width)}  {share:4.0%} {'█' * round(_BAR * share)}".rstrip()
            for key, share in self.importance.items()
        ]

    def held_out_lines(self) -> list[str]:
        """Returns the figures on held-out rows of base model and best trial."""
        base, tuned = self.held_out.get("base", {}), self.held_out.get("finetuned", {})
        return [
            f"{key.replace('validation_', '').replace('_', ' ')}: "
            + (f"base model {base[key]:.4f}, " if key in base else "")
            + f"best trial {value:.4f}"
            for key, value in tuned.items()
        ]


def make_report(folder: SweepFolder, held_out: dict[str, dict[str, float]] | None = None) -> Report:
    """Returns the report of a sweep's current state. Raises RunError if a trial cannot be read."""
    trials, goal = folder.trials(), folder.conf.goal
    best = best_of(trials, goal)
    sign = 1 if goal == "min" else -1
    order = sorted(
        trials, key=lambda one: (one is not best, one.metric is None, sign * (one.metric or 0.0), one.number)
    )
    return Report(folder.conf.name, folder.conf.metric, order, best, importance(folder.conf, trials), held_out or {})


def curves(folder: SweepFolder, trials: Sequence[Trial]) -> Comparison:
    """Returns the metric by step of each trial that has been validated."""
    column = COLUMNS[folder.conf.metric]
    found = {}
    for trial in trials:
        points = [(row["step"], row[column]) for row in folder.metrics(trial) if row.get(column) is not None]
        if points:
            found[trial.name] = ([step for step, _ in points], [value for _, value in points])
    return Comparison(list(found), {}, {}, column, found)


def terminal_curves(folder: SweepFolder, report: Report, width: int, color: bool) -> str:
    """Returns the best trials' curves, drawn with characters; empty if there are none."""
    comparison = curves(folder, report.trials[:_DRAWN])
    return terminal_plot(comparison, width, color=color) if comparison.curves else ""


def write_report(folder: SweepFolder, report: Report) -> None:
    """Writes report.md, report.json, curves.png and importance.png into the sweep's folder. Raises RunError."""
    path = folder.path
    drawn = curves(folder, report.trials)
    if drawn.curves:
        png_plot(drawn, path / "curves.png")
    if report.importance:
        _importance_plot(report.importance, path / "importance.png")
    write_json(path / "report.json", asdict(report))
    write_text(path / "report.md", _markdown(report, drawn))


def _markdown(report: Report, drawn: Comparison) -> str:
    head, *rows = report.table()
    lines = [f"# Sweep {report.name}", "", _row(head), _row(["---"] * len(head)), *map(_row, rows), ""]
    if report.best:
        lines += [
            f"Best: {report.best.name}, {report.metric} {report.best.metric:.4f} on the validation rows, by which it was "
            "selected. `llm-ray finetune --config best.yaml` reproduces it.",
            "",
        ]
    if report.held_out:
        lines += ["On held-out rows, not used for training or selection:", ""]
        lines += [*(f"- {line}" for line in report.held_out_lines()), ""]
    if drawn.curves:
        lines += ["![curves](curves.png)", ""]
    if report.importance:
        judged = sum(trial.metric is not None for trial in report.trials)
        lines += [f"Importance of each key, from {judged} trials:", ""]
        lines += [*(f"- `{key}`: {share:.0%}" for key, share in report.importance.items()), ""]
        lines += ["![importance](importance.png)", ""]
    return "\n".join(lines)


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _importance_plot(shares: dict[str, float], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.4 * len(shares)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(list(shares), list(shares.values()))
    axes.invert_yaxis()
    axes.set_xlabel("importance")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}") from error
