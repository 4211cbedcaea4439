"""Atomic checkpoints; the last few and the best one are kept.

A checkpoint is a folder `step_00000042` of torch.distributed.checkpoint files: trainable weights, optimizer, each
worker's random state, and progress (step, best validation loss, …). It is written under a hidden name and renamed once
every worker has written its part, so any folder with a final name is complete.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from llm_ray.errors import RunError, TrainError
from llm_ray.train.workers import gather_error, world_size

BEST = "best"
_STEP = re.compile(r"step_(\d{8})")
_LEARNING = StateDictOptions(ignore_frozen_params=True)


@dataclass
class Progress:
    """What a resumed run needs besides weights, optimizer and random state."""

    step: int = 0
    best_validation_loss: float | None = None
    best_step: int | None = None
    validations_without_improvement: int = 0


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in `folder`, oldest first."""
    return (
        sorted(p for p in folder.glob("step_*") if _STEP.fullmatch(p.name) and (p / ".metadata").is_file())
        if folder.is_dir()
        else []
    )


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer step after which `checkpoint` was written. Raises RunError if its name is not one of a
    checkpoint."""
    found = _STEP.fullmatch(checkpoint.name)
    if not found:
        raise RunError(f"{checkpoint} is not a checkpoint: expected a folder called step_NNNNNNNN")
    return int(found[1])


def save(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, rank: int) -> Path:
    """Writes a checkpoint of all workers in `folder` and returns its path. Every worker must call it. Raises TrainError
    on all workers if one cannot write."""
    final = folder / f"step_{progress.step:08d}"
    state = {
        "model": _learning_weights(module),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=_LEARNING),
        f"random_{rank}": _random_state(),
        "progress": asdict(progress),
    }
    _write(
        final,
        lambda partial: dcp.save(
            state, storage_writer=dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        ),
        rank,
    )
    return final


def save_best(folder: Path, module: nn.Module, rank: int) -> None:
    """Writes the trainable weights as the best so far. Every worker must call it. Raises TrainError on all workers if
    one cannot write."""
    state = {"model": _learning_weights(module)}
    _write(folder / BEST, lambda partial: dcp.save(state, checkpoint_id=partial), rank)


def load(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> Progress:
    """Restores module, optimizer and this worker's random state from `checkpoint`, and returns its progress. Every
    worker must call it. Raises TrainError on all workers if it is damaged or belongs to another model."""
    state: dict[str, Any] = {
        "model": _learning_weights(module),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=_LEARNING),
        "progress": asdict(Progress()),
    }
    # Missing if there are more workers than when it was written.
    if any(name.startswith(f"random_{rank}.") for name in _names(checkpoint)):
        state[f"random_{rank}"] = _random_state()
    _read(state, checkpoint)
    set_model_state_dict(module, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(module, optimizer, state["optimizer"], options=_LEARNING)
    if f"random_{rank}" in state:
        _set_random_state(state[f"random_{rank}"])
    return Progress(**state["progress"])


def load_weights(checkpoint: Path, module: nn.Module) -> None:
    """Loads only the trainable weights of `checkpoint` into `module`, in a single process without a process group.
    Raises TrainError if it is damaged or belongs to another model."""
    state = {"model": _learning_weights(module)}
    _read(state, checkpoint)
    set_model_state_dict(module, state["model"], options=StateDictOptions(strict=False))


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the last `keep` checkpoints, and leftovers of interrupted writes. Only one worker may call it."""
    for old in list_checkpoints(folder)[:-keep]:
        hidden = old.with_name(f".{old.name}.old")
        old.rename(hidden)  # a half-deleted checkpoint must not look complete
        shutil.rmtree(hidden, ignore_errors=True)
    for debris in [*folder.glob(".step_*"), *folder.glob(f".{BEST}.*")]:
        shutil.rmtree(debris, ignore_errors=True)


def _read(state: dict[str, Any], checkpoint: Path) -> None:
    """Fills `state` from `checkpoint`. Raises TrainError on every worker if one cannot read it."""
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=world_size() == 1)
    except CheckpointException as error:
        earlier = [str(p) for p in list_checkpoints(checkpoint.parent) if p.name < checkpoint.name]
        ways = f"from an earlier one (--resume {earlier[-1]}), or from the start" if earlier else "from the start"
        raise TrainError(
            f"the checkpoint {checkpoint} is damaged, or does not match the conf's model and tuning: "
            f"{_reason(error)}. Resume {ways} (--resume no)"
        ) from error


def _names(checkpoint: Path) -> list[str]:
    """Names of the values in `checkpoint`; empty if unreadable, which loading it will report."""
    try:
        return list(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)
    except Exception:  # unpickling may raise anything
        return []


def _write(final: Path, write: Callable[[Path], object], rank: int) -> None:
    partial = final.with_name(f".{final.name}.partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    gather_error(None)
    problem: str | None = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)
    except CheckpointException as error:
        problem = _reason(error)
    except OSError as error:
        problem = str(error)
    if failed := gather_error(problem):
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(final.parent).free if final.parent.is_dir() else 0
        raise TrainError(
            f"the checkpoint {final} could not be written: {failed}. {free / 2**30:.1f} GiB are free there; earlier "
            "checkpoints are complete: free some space, then run the same command again"
        )
    if rank == 0:
        if final.exists():
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(final)
    if world_size() > 1:
        dist.barrier()


def _reason(error: CheckpointException) -> str:
    cause, _ = next(iter(error.failures.values()))  # (exception, traceback)
    return next(iter(str(cause).splitlines()), type(cause).__name__)


def _learning_weights(module: nn.Module) -> dict[str, Any]:
    """Names and tensors of the trainable weights, tied ones once. (torch omits frozen weights under only one of their
    names, so a frozen embedding tied to the output head would be in every checkpoint.)"""
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    learning = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    others = {name for name, _ in inner.named_parameters(remove_duplicate=False)} - learning
    return {
        name: value for name, value in get_model_state_dict(module, options=_LEARNING).items() if name not in others
    }


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "rest": {
            "version": version,
            "gauss": gauss,
            "kind": kind,
            "pos": pos,
            "has_gauss": has_gauss,
            "cached": cached,
        },
    }


def _set_random_state(state: dict[str, Any]) -> None:
    rest = state["rest"]
    torch.set_rng_state(state["torch"])
    random.setstate((rest["version"], tuple(state["python"].tolist()), rest["gauss"]))
    np.random.set_state(
        (rest["kind"], state["numpy"].numpy().astype(np.uint32), rest["pos"], rest["has_gauss"], rest["cached"])
    )
