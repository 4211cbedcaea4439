"""What the driver gives to the training workers and gets back. It imports neither torch nor transformers, so that the
process of Ray Train's controller, which loads the training function too, starts without them."""

from __future__ import annotations

import os
from typing import Any, Literal, TypedDict

from llm_ray.imports import uncollected
from llm_ray.models.load import Base

NOTES_FILE = ".notes"
"""In the checkpoint folder: lines from worker 0 for the user."""


class Task(TypedDict):
    """Arguments of every worker, from the driver."""

    conf: dict[str, Any]  # FinetuneConf as JSON
    base: Base
    cpus: int  # CPUs of this worker
    resume_from: str | None  # checkpoint to start from if the run has none of its own


class Outcome(TypedDict):
    """The result, which rank 0 returns to the driver. `failed` means that a retry would not help; other failures are
    raised, and the driver retries."""

    status: Literal["done", "stopped", "failed"]
    reason: str
    step: int
    total_steps: int
    best_step: int | None
    best_validation_loss: float | None
    reference_seconds: float
    """Time for the base model's log-probabilities, if the objective needs them."""


def train_here(task: Task) -> Outcome:
    """Trains on this worker (`llm_ray.train.recipe.train`)."""
    with uncollected():
        from llm_ray.train.recipe import train

    return train(task)


def worker_environment() -> dict[str, str]:
    """Returns the environment variables of the workers, for Ray's runtime_env."""
    kept = ("HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN_PATH", "LLM_RAY_HOME")
    return {key: os.environ[key] for key in kept if key in os.environ} | {"TOKENIZERS_PARALLELISM": "false"}
