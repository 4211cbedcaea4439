"""Figures of benchmarks (`evaluation.tasks`) in a run's result, for people: names and values, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def label(row: Mapping[str, Any]) -> str:
    """Returns the name of a figure: its task and metric, and how answers were extracted, if they were."""
    extracted = "" if row["filter"] == "none" else f" ({row['filter']})"
    return f"{row['task']} {row['metric']}{extracted}"


def shown(value: float | None, error: float | None) -> str:
    """Formats a value with its standard error."""
    if value is None:
        return "–"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def whole(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows without those of tasks whose group has figures of its own (57 of mmlu, say)."""
    summed = {row["task"] for row in rows}
    return [row for row in rows if row["group"] not in summed]


def benchmark_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one line for each figure of :func:`whole`."""
    return [
        f"{label(row)}: base {shown(row['base'], row['base_stderr'])}, "
        f"finetuned {shown(row['finetuned'], row['finetuned_stderr'])}"
        for row in whole(rows)
    ]
