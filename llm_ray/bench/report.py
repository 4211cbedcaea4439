"""Results of a load test as a table, JSON and a plot.

print("\\n".join(table(report)))
write(report, Path("bench-results/monday"))    # report.json and plot.png
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.bench.load import LoadReport, Spread
from llm_ray.errors import LlmRayError
from llm_ray.files import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLIENT_BOUND = 0.7
"""Share of a core above which the load generator may limit the results."""


def spreads(report: LoadReport) -> dict[str, Spread | None]:
    """Returns the latency metrics by name, in seconds."""
    return {
        "time_to_first_token": report.time_to_first_token,
        "time_per_output_token": report.time_per_output_token,
        "inter_token_latency": report.inter_token_latency,
        "end_to_end": report.end_to_end,
    }


def figures(report: LoadReport) -> dict[str, Any]:
    """Returns all metrics as a JSON object; latencies in seconds, null without samples."""
    return {
        "endpoint": report.url,
        "model": report.model,
        "load": {name: value for name, value in asdict(report.load).items() if value is not None},
        "seconds": round(report.seconds, 3),
        "answered": len(report.samples),
        "failed": len(report.failures),
        "failures": report.failures_by_kind,
        "failure_messages": {failure.kind: failure.message for failure in reversed(report.failures)},
        "prompt_tokens": report.prompt_tokens,
        "output_tokens": report.output_tokens,
        "requests_per_second": round(report.requests_per_second, 4),
        "output_tokens_per_second": round(report.output_tokens_per_second, 3),
        "total_tokens_per_second": round(report.total_tokens_per_second, 3),
        **{
            f"{name}_seconds": spread and {key: round(value, 6) for key, value in asdict(spread).items()}
            for name, spread in spreads(report).items()
        },
        "client_cpu_seconds": round(report.client_cpu_seconds, 3),
        "client_cpu_share": round(report.client_cpu_share, 4),
    }


def table(report: LoadReport) -> Iterator[str]:
    """Yields the lines of a table for the terminal."""
    load, answered = report.load, len(report.samples)
    how = f"{load.concurrency} at once" if load.concurrency else f"{load.rate:g} requests/s on average"
    yield f"{report.model} at {report.url}: {how}, at most {load.max_tokens} tokens per answer"
    failures = ", ".join(f"{kind}: {count}" for kind, count in report.failures_by_kind.items())
    yield f"  requests          {answered} answered, {len(report.failures)} failed{f' ({failures})' if failures else ''} in {report.seconds:.1f} s"
    yield f"  requests/s        {report.requests_per_second:.2f}"
    yield f"  output tokens/s   {report.output_tokens_per_second:.1f}"
    yield f"  total tokens/s    {report.total_tokens_per_second:.1f}"
    if answered:
        yield f"  tokens/request    {report.prompt_tokens / answered:.1f} in, {report.output_tokens / answered:.1f} out"
    yield f"  client CPU        {report.client_cpu_seconds:.2f} s, {report.client_cpu_share:.0%} of a core"
    if report.client_cpu_share > CLIENT_BOUND:
        yield "                    (so high that the load generator may limit the figures)"
    columns = [field.name for field in fields(Spread)]
    yield f"  {'milliseconds':<24}" + "".join(f"{column:>10}" for column in columns)
    for name, spread in spreads(report).items():
        cells = [f"{value * 1000:.1f}" for value in asdict(spread).values()] if spread else ["–"] * len(columns)
        yield f"  {name.replace('_', ' '):<24}" + "".join(f"{cell:>10}" for cell in cells)


def write(report: LoadReport, folder: Path) -> None:
    """Writes `folder`/report.json, with one row per request, and `folder`/plot.png. Raises LlmRayError if they cannot
    be written."""
    rows = [
        {
            "sent": round(sample.sent, 6),
            "time_to_first_token": round(sample.first, 6),
            "end_to_end": round(sample.last, 6),
            "prompt_tokens": sample.prompt_tokens,
            "output_tokens": sample.output_tokens,
        }
        for sample in report.samples
    ]
    failed = [asdict(failure) for failure in report.failures]
    try:
        write_json(folder / "report.json", {**figures(report), "requests": rows, "failed_requests": failed})
        plot(report, folder / "plot.png")
    except OSError as error:
        raise LlmRayError(f"--output {folder} cannot be written: {error.strerror}") from error


def plot(report: LoadReport, file: Path) -> None:
    """Writes a PNG with three plots: distributions of request latencies and of token latencies, and the load over time.
    Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    requests, tokens, course = figure.subplots(1, 3)
    samples = report.samples
    _distribution(requests, "time to first token", [sample.first for sample in samples], "s")
    _distribution(requests, "end to end", [sample.last for sample in samples], "s")
    per_token = [value * 1000 for sample in samples if (value := sample.per_token) is not None]
    _distribution(tokens, "time per output token", per_token, "ms")
    gaps = [(b - a) * 1000 for sample in samples for a, b in zip(sample.arrivals, sample.arrivals[1:], strict=False)]
    _distribution(tokens, "between tokens", gaps, "ms")
    _course(course, report)
    figure.suptitle(
        f"{report.model}: {report.output_tokens_per_second:.1f} output tokens/s, {report.requests_per_second:.2f} "
        "requests/s"
    )
    for axes in (requests, tokens, course):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(file, format="png")


def _distribution(axes: Axes, label: str, values: list[float], unit: str) -> None:
    """Plots the cumulative distribution of `values`."""
    if values:
        axes.ecdf(values, label=label, linewidth=1.4)
    axes.set_xlabel(unit)
    axes.set_ylabel("share")


def _course(axes: Axes, report: LoadReport) -> None:
    """Plots output tokens per second and the number of requests in flight at the middle of each second."""
    import numpy as np

    seconds = np.arange(int(report.seconds) + 2)
    # A chunk may hold several tokens, so a request's tokens are spread evenly over its chunks.
    arrived = [sample.sent + at for sample in report.samples for at in sample.arrivals]
    weights = [sample.output_tokens / len(sample.arrivals) for sample in report.samples for _ in sample.arrivals]
    rate, _ = np.histogram(arrived, bins=seconds, weights=weights)
    spans = [(sample.sent, sample.sent + sample.last) for sample in report.samples]
    spans += [(failure.sent, failure.ended) for failure in report.failures]
    middles = seconds[:-1] + 0.5
    under_way = [sum(1 for start, end in spans if start <= middle < end) for middle in middles]
    axes.stairs(rate, seconds, label="output tokens/s", linewidth=1.4)
    axes.plot(middles, under_way, label="requests in flight", linewidth=1.4)
    ended = [failure.ended for failure in report.failures]
    if ended:
        axes.plot(ended, [0] * len(ended), "x", label="failures", color="tab:red", clip_on=False)
    axes.set_xlabel("s")
    axes.set_ylim(bottom=0)
