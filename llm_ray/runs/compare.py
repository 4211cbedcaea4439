"""Compares runs: conf keys in which they differ, figures, and curves in the terminal or as PNG.

comparison = compare([find_run(runs, "a"), find_run(runs, "b")], "loss")
print(terminal_plot(comparison))
png_plot(comparison, Path("loss.png"))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.errors import RunError
from llm_ray.nearest import nearest_names
from llm_ray.runs.benchmarks import label, whole
from llm_ray.runs.folder import RunFolder, flat, stored_conf
from llm_ray.runs.listing import rate, summary
from llm_ray.runs.metrics import METRICS, read_metrics

Curve = tuple[list[int], list[float]]
"""Steps, and the metric's value at each."""

MARKERS = "ox+*#@%&"
_OF_EVERY_RUN = ("name", "paths.")  # keys that always differ


@dataclass(frozen=True)
class Comparison:
    """`conf` and `figures` map each key to one value per run, in the order of `runs`; None for a run without it."""

    runs: list[str]
    conf: dict[str, list[Any]]
    figures: dict[str, list[Any]]
    metric: str
    curves: dict[str, Curve]


def compare(paths: Sequence[Path], metric: str) -> Comparison:
    """Compares the runs in `paths`, with their curves of `metric` (a column of metrics.jsonl; the curve of a run
    without it is empty).

    Raises RunError if no run has the metric or a conf cannot be read.
    """
    rows = [read_metrics(path / METRICS) for path in paths]
    _check_metric(metric, rows)
    confs = [flat(stored_conf(path)) for path in paths]
    figures = [_figures(path, of_run) for path, of_run in zip(paths, rows, strict=True)]
    keys = [key for key in dict.fromkeys(key for conf in confs for key in conf) if not key.startswith(_OF_EVERY_RUN)]
    by_run = {key: [conf.get(key) for conf in confs] for key in keys}
    names = [path.name for path in paths]
    return Comparison(
        runs=names,
        conf={key: values for key, values in by_run.items() if any(value != values[0] for value in values)},
        figures={
            key: [of_run.get(key) for of_run in figures]
            for key in dict.fromkeys(key for of_run in figures for key in of_run)
        },
        metric=metric,
        curves={name: _curve(of_run, metric) for name, of_run in zip(names, rows, strict=True)},
    )


def terminal_plot(comparison: Comparison, width: int = 100, height: int = 22, color: bool = False) -> str:
    """Draws the curves as text, distinguished by color or, without `color`, by marker."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("simple" if color else "colorless")
    figure.plot_size(width, height)
    for (name, (steps, values)), mark in zip(comparison.curves.items(), itertools.cycle(MARKERS)):
        if steps:
            figure.draw(figure.signal(steps, values, marker="braille" if color else mark).lines().label(name))
    top, end = (max(max(curve[axis]) for curve in comparison.curves.values() if curve[axis]) for axis in (1, 0))
    figure.legend(x=end, y=top, ha="right", va="top", relative=True)  # losses begin at the upper left
    figure.title(f"{comparison.metric.replace('_', ' ')} by step")
    text = str(figure.build())
    return text if color else plotext.uncolorize(text)


def png_plot(comparison: Comparison, file: Path) -> None:
    """Writes the curves as a PNG. Raises RunError if the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, (steps, values)) in enumerate(comparison.curves.items()):
        if steps:  # colors repeat after ten runs with another line style
            axes.plot(
                steps,
                values,
                label=name,
                linewidth=1.4,
                linestyle=("-", "--", ":", "-.")[number // 10 % 4],
                marker="." if len(steps) < 50 else "",
            )
    axes.set_xlabel("step")
    axes.set_ylabel(comparison.metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise RunError(f"--png {file} cannot be written: {error.strerror}") from error


def _check_metric(metric: str, rows: list[list[dict[str, Any]]]) -> None:
    known = sorted(
        {key for of_run in rows for row in of_run for key, value in row.items() if value is not None}
        - {"step", "total_steps"}
    )
    if metric in known:
        return
    if not known:
        raise RunError("none of these runs has metrics yet")
    nearest = nearest_names(metric, known)
    raise RunError(
        f"--metric {metric}: not in any of the runs; {f'did you mean {nearest[0]}? ' if nearest else ''}There are "
        f"{', '.join(known)}"
    )


def _curve(rows: list[dict[str, Any]], metric: str) -> Curve:
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _figures(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a run's figures from its metrics and, if there was one, its evaluation."""
    run, result = summary(path), RunFolder(path).result()
    steps = [row for row in rows if "loss" in row]
    validation = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    figures: dict[str, Any] = {
        "state": run.state,
        "steps": run.step,
        "loss": run.loss,
        "validation loss": run.validation_loss,
    }
    figures |= {"lowest validation loss": min(validation, default=None), "tokens/s": rate(steps)}
    figures |= {"tokens": sum(row["tokens"] for row in steps), "training seconds": sum(row["seconds"] for row in steps)}
    evaluation = result.get("evaluation", {})
    for which in ("base", "finetuned"):
        figures |= {f"{key.replace('_', ' ')} ({which})": value for key, value in evaluation.get(which, {}).items()}
        figures |= {f"{label(row)} ({which})": row[which] for row in whole(evaluation.get("tasks", []))}
    return figures
