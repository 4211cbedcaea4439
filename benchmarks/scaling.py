"""Two workers with one core each against one worker with one core: tokens per second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.table import comparison
from benchmarks.training import messages, write_rows


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures both sides with the same rows per step."""
    train, held_out = (messages(file) for file in write_rows(data, rows, work))
    one = ours.train("one-worker", model, train, held_out, work, workers=1, cpus=1)
    two = ours.train("two-workers", model, train, held_out, work, workers=2, cpus=1)
    table = [
        comparison(
            "two workers against one, tokens/s",
            two["tokens_per_second"],
            one["tokens_per_second"],
            "1.8 x, then 1.9 x",
        )
    ]
    return {"one": one, "two": two, "table": table}
