"""Summary of the league's results: tables for a terminal, and a plot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.league.run import PREFIX
from benchmarks.league.shares import Median, decode_share, prefill_share
from benchmarks.league.weights import Shape

_FIGURES = (
    "output_tokens_per_second",
    "prompt_tokens_per_request",
    "cpu_seconds_per_1000_tokens",
    "memory_bytes",
    *(f"{name}_{p}" for name in ("ttft", "tpot") for p in ("p50", "p95", "p99")),
)


def summary(results: dict[str, Any], of: Shape) -> dict[str, Any]:
    """Returns medians over the rounds, with minimum and maximum, of the machine's limits, of each server, and of each
    of its loads, with the shares of the limits that they reach."""
    limits = _limits(results["limits"])
    servers, loads = {}, []
    for name, entry in results["servers"].items():
        start = Median.of([start["seconds_to_first_token"] for start in entry["starts"]])
        rows = [row for row in entry["rows"] if "reason" not in row]
        memory = Median.of([row["memory_bytes"] for row in rows])
        servers[name] = {
            "seconds_to_first_token": start and asdict(start),
            "most_memory_bytes": memory and memory.most,
        }
        for cell, group in _by_cell(rows):
            found = {figure: Median.of([row[figure] for row in group if figure in row]) for figure in _FIGURES}
            loads.append(
                {
                    "server": name,
                    **cell,
                    "failed": sum(row["failed"] for row in group),
                    **{figure: middle and asdict(middle) for figure, middle in found.items()},
                    **_shares(entry, cell, found, limits, of),
                }
            )
    return {"limits": limits, "servers": servers, "loads": loads}


def tables(results: dict[str, Any], summed: dict[str, Any]) -> Iterator[Table]:
    """Yields a table of the servers, then one for each kind of prompt."""
    yield _servers(results, summed)
    loads = sorted(summed["loads"], key=lambda load: (load["shared"], load["prompt"], load["concurrency"]))
    for (shared, prompt), group in itertools.groupby(loads, key=lambda load: (load["shared"], load["prompt"])):
        table = Table(title=_title(prompt, shared))
        for heading in ("concurrent", "server", "tokens/s", "(min to max)", "first token, ms p50/p95/p99"):
            table.add_column(heading, justify="left" if heading == "server" else "right", no_wrap=True)
        for heading in ("per token, ms p50/p95/p99", "CPU s/1000", "MiB", "decode", "prefill", "failed"):
            table.add_column(heading, justify="right", no_wrap=True)
        for load in group:
            rate = load["output_tokens_per_second"]
            table.add_row(
                str(load["concurrency"]),
                load["server"],
                f"{rate['median']:.1f}",
                f"{rate['least']:.1f} to {rate['most']:.1f}",
                _times(load, "ttft"),
                _times(load, "tpot"),
                f"{load['cpu_seconds_per_1000_tokens']['median']:.2f}",
                f"{load['memory_bytes']['median'] / 2**20:.0f}",
                _percent(load["decode_share"]),
                _percent(load["prefill_share"]),
                str(load["failed"]),
            )
        yield table


def plot(summed: dict[str, Any], file: Path) -> None:
    """Writes a PNG: tokens/s, time to first token and time per token by concurrency, with a column for each kind of
    prompt; medians with bars from minimum to maximum. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = sorted({(load["shared"], load["prompt"]) for load in summed["loads"]})
    names = list(dict.fromkeys(load["server"] for load in summed["loads"]))
    rows = (
        ("output_tokens_per_second", "output tokens/s", 1.0),
        ("ttft_p50", "time to first token, ms (p50)", 1000.0),
        ("tpot_p50", "time per output token, ms (p50)", 1000.0),
    )
    figure = Figure(figsize=(max(6.0, 4.5 * len(kinds)), 11), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), max(1, len(kinds)), squeeze=False)
    for column, (shared, prompt) in enumerate(kinds):
        for line, (name, label, factor) in enumerate(rows):
            axes = grid[line][column]
            for server in names:
                points = [
                    (load["concurrency"], load[name])
                    for load in summed["loads"]
                    if (load["server"], load["shared"], load["prompt"]) == (server, shared, prompt) and load[name]
                ]
                points.sort(key=lambda point: point[0])
                middle = [factor * found["median"] for _, found in points]
                bars = [
                    [factor * (found["median"] - found["least"]) for _, found in points],
                    [factor * (found["most"] - found["median"]) for _, found in points],
                ]
                colour = f"C{names.index(server) % 10}"
                mark = "o" if names.index(server) < 10 else "s"
                axes.errorbar(
                    [at for at, _ in points], middle, bars, label=server, marker=mark, color=colour, capsize=2
                )
            axes.set_xscale("log", base=2)
            counts = sorted({load["concurrency"] for load in summed["loads"]})
            axes.set_xticks(counts, labels=[str(count) for count in counts])
            axes.set_xlabel("concurrent requests")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        grid[0][column].set_title(_title(prompt, shared))
    if names:
        grid[0][0].legend(frameon=False, fontsize="small")
    figure.savefig(file, format="png")


def _limits(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Returns medians by the limit's name; empty before the first round."""
    if not rounds:
        return {}
    found = {name: Median.of([one["gflops"][name] for one in rounds]) for name in rounds[0]["gflops"]}
    found["memory_gb_per_s"] = Median.of([one["memory_gb_per_s"] for one in rounds])
    return {name: middle.median for name, middle in found.items() if middle}


def _by_cell(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    keys = ("concurrency", "prompt", "shared")
    cells = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    for cell in cells:
        yield dict(zip(keys, cell, strict=True)), [row for row in rows if tuple(row[key] for key in keys) == cell]


def _shares(
    entry: dict[str, Any], cell: dict[str, Any], found: dict[str, Median | None], limits: dict[str, float], of: Shape
) -> dict[str, float | None]:
    """Returns the shares of the machine's limits. Prefill is only measured for a single prompt computed in full: with
    several requests, the time to the first token includes other prompts, and of a shared prefix only the rest is
    computed."""
    per_token, first, prompt = found["tpot_p50"], found["ttft_p50"], found["prompt_tokens_per_request"]
    alone = cell["concurrency"] == 1 and not cell["shared"]
    return {
        "decode_share": decode_share(entry["step_bytes"], per_token.median, limits["memory_gb_per_s"])
        if per_token
        else None,
        "prefill_share": prefill_share(of, prompt.median, first.median, limits[entry["arithmetic"]])
        if alone and first and prompt
        else None,
    }


def _servers(results: dict[str, Any], summed: dict[str, Any]) -> Table:
    limits = summed["limits"]
    title = "limits: not measured"
    if limits:
        products = ", ".join(f"{limits[name]:.0f} {name}" for name in ("fp32", "bf16", "int8"))
        title = f"limits: {limits['memory_gb_per_s']:.1f} GB/s of memory, GFLOP/s {products}"
    table = Table("server", "weights", "MB", "perplexity", "command to first token, s", "max MiB", "", title=title)
    for name, entry in results["servers"].items():
        start, memory = (summed["servers"][name][key] for key in ("seconds_to_first_token", "most_memory_bytes"))
        reasons = [*filter(None, (entry.get("reason"), entry.get("no_perplexity")))]
        reasons += [failure["reason"] for failure in entry.get("failures", []) if failure["reason"] not in reasons]
        reasons += [row["reason"] for row in entry["rows"] if row.get("reason") not in (None, *reasons)]
        table.add_row(
            name,
            entry["form"],
            f"{entry['stored_bytes'] / 1e6:.0f}" if "stored_bytes" in entry else "–",
            f"{entry['perplexity']:.2f}" if "perplexity" in entry else "–",
            f"{start['median']:.1f} ({start['least']:.1f} to {start['most']:.1f})" if start else "–",
            f"{memory / 2**20:.0f}" if memory else "–",
            "; ".join(reasons),
        )
    return table


def _title(prompt: int, shared: bool) -> str:
    return f"prompts of {prompt} tokens" + (f" after {PREFIX} shared ones" if shared else "")


def _times(load: dict[str, Any], name: str) -> str:
    found = [load[f"{name}_{p}"] for p in ("p50", "p95", "p99")]
    return " / ".join(f"{1000 * middle['median']:.0f}" if middle else "–" for middle in found)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
