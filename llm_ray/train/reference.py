"""The log-probabilities of answers under the base model, with which objectives compare the trained model.

They are computed once, before the first update, when the model still equals the base model: fresh adapters add nothing.
So no second copy of the model is needed, and steps cost no more than without a reference. They are stored beside the
prepared data, in a file per `PART` pairs or rows, so an interrupted run continues after the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import as_run
from llm_ray.data.prepare import lengths_of
from llm_ray.errors import TrainError
from llm_ray.hardware import Precision
from llm_ray.models.load import Base, identity
from llm_ray.runs.folder import inputs_hash
from llm_ray.train.batches import Mismatches, collate, passes_over
from llm_ray.train.workers import broadcast, gather_error, world_size

PART = 256
FORM = 1
"""Version of the file format; files of another version are recomputed."""


def reference_folder(conf: FinetuneConf, base: Base, precision: Precision) -> Path:
    """Returns the folder for the run's prepared data, named by a hash of everything else that the values depend on: the
    model and the settings of its arithmetic, and what decides which answers are mismatched with which prompts."""
    computed: list[object] = [
        conf.model.dtype,
        precision,
        conf.training.accelerator,
        conf.training.strategy,
        conf.tuning.method,
    ]
    if conf.tuning.mismatches:
        computed += [as_run(conf.training.global_batch_size), conf.training.seed]
    key = inputs_hash(FORM, PART, identity(base), computed)
    return conf.run_dir / "prepared" / "reference" / key[:16]


def reference_log_probabilities(
    module: nn.Module,
    data: datasets.Dataset,
    folder: Path,
    *,
    packed: bool,
    limit: int,
    rank: int,
    workers: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    stop: Path,
    mismatches: Mismatches | None = None,
) -> Tensor | None:
    """Returns the log-probabilities, in nats, of the chosen and the rejected answer of every pair of `data`: fp32
    [pairs, 2]; for rated answers those of every row: fp32 [rows, 1], with `mismatches` [rows, 2], of these as well. Every
    worker must call it, and gets all of them.

    `module`: the model before any training; `limit`: maximum tokens of a forward pass; `folder`: where the values are
    stored. Returns None if the file `stop` appears between two parts. Raises TrainError on all workers if a file cannot
    be written.
    """
    answers_per_row = 2 if "chosen" in data.column_names else 1
    computed: list[tuple[np.ndarray, Mismatches | None]] = [(lengths_of(data, padded=not packed), None)]
    if mismatches:
        computed.append((mismatches.lengths, mismatches))
    width = answers_per_row * len(computed)
    parts: list[np.ndarray] = []
    for begin in range(0, len(data), PART):
        rows = range(begin, min(begin + PART, len(data)))
        file = folder / f"{begin:09d}.npy"
        known = broadcast(_kept(file, (len(rows), width)) if rank == 0 else None)
        if known is None:
            if broadcast(stop.exists()):
                return None
            known = torch.zeros(len(rows), len(computed), answers_per_row, dtype=torch.float64)
            module.eval()
            with torch.no_grad(), autocast():
                for number, (lengths, answers) in enumerate(computed):
                    for indices in passes_over(lengths[begin : rows.stop], limit, rank, workers):
                        batch = collate(data, [begin + i for i in indices], packed, mismatches=answers)
                        given = module(batch, log_probabilities=True)
                        if indices:
                            known[indices, number] = given.view(-1, answers_per_row).double()
            module.train()
            if world_size() > 1:
                dist.all_reduce(known)
            known = known.view(len(rows), width).numpy()
            if failed := gather_error(_write(file, known) if rank == 0 else None):
                raise TrainError(
                    f"the base model's log-probabilities {file} could not be written: {failed}. Free some space, then "
                    "run the same command again: it continues after the parts already written"
                )
        parts.append(known)
    return torch.from_numpy(np.concatenate(parts)).float()


def _kept(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        values = np.load(file)
    except (OSError, ValueError):  # missing or incomplete
        return None
    return values if values.shape == shape else None


def _write(file: Path, values: np.ndarray) -> str | None:
    """Writes the file atomically. Returns the error message, None on success."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            np.save(out, values)
        partial.rename(file)
    except OSError as error:
        return str(error)
    return None
