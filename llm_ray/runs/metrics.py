"""Training metrics, one row per step: rank 0 writes metrics.jsonl (and TensorBoard), displays read it.

writer = MetricsWriter(run_dir, tensorboard=True, resume_from_step=0)
writer.write({"step": 1, "loss": 2.3})
read_metrics(run_dir / "metrics.jsonl", last=1)
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from llm_ray.files import write_text

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_BLOCK = 8192


class MetricsWriter:
    """Appends rows to a run's ``metrics.jsonl`` and optionally to ``tensorboard/``.

    First removes rows with a step after `resume_from_step` (all rows if it is 0), so that each step appears once.
    Raises OSError if the folder cannot be written.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, resume_from_step: int, perplexity: bool = True) -> None:
        """`perplexity`: whether losses are mean negative log-likelihoods of tokens, so that their exponential is the
        perplexity."""
        path = run_dir / METRICS
        kept = [row for row in read_metrics(path) if row["step"] <= resume_from_step] if resume_from_step else []
        write_text(path, "".join(_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._perplexity = perplexity
        self._board = None
        if not resume_from_step:
            shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(run_dir / TENSORBOARD), purge_step=resume_from_step + 1 if resume_from_step else None
            )

    def write(self, row: Mapping[str, float | int]) -> None:
        """Appends a row, which must contain `step`. Adds the perplexity to a validation loss if enabled. NaN and
        infinity become null."""
        figures = dict(row)
        if self._perplexity and "validation_loss" in figures:
            figures["validation_perplexity"] = _exp(figures["validation_loss"])
        self._file.write(_line(figures))
        self._file.flush()
        if self._board:
            for name, value in figures.items():
                if name not in ("step", "total_steps"):
                    tag = (
                        name.replace("validation_", "validation/")
                        if name.startswith("validation_")
                        else f"train/{name}"
                    )
                    self._board.add_scalar(tag, value, int(figures["step"]))
            self._board.flush()  # a killed worker would lose the buffer

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; with `last` only the last rows, read from the file's tail.

    Returns an empty list if there is no file; skips incomplete lines (the writer was killed or is still writing).
    """
    try:
        with path.open("rb") as file:
            lines = (
                file.read().splitlines() if last is None else _tail(file, last + 1)
            )  # one more, since the last may be incomplete
    except OSError as error:
        # On NFS, a file that another host has just replaced is stale; the next read succeeds.
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return []
        raise
    rows = [row for line in lines if (row := _row(line)) is not None]
    return rows if last is None else rows[max(0, len(rows) - last) :]


def finite(value: Any) -> Any:
    """Returns `value` with NaN and infinity replaced by None at any depth, as strict JSON requires."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _tail(file: IO[bytes], count: int) -> list[bytes]:
    """Returns the last `count` lines of `file`."""
    start = end = file.seek(0, os.SEEK_END)
    text = b""
    while start and text.count(b"\n") <= count:
        start = max(0, end - max(_BLOCK, 2 * (end - start)))
        file.seek(start)
        text = file.read(end - start)
    return text.splitlines()[-count:]
