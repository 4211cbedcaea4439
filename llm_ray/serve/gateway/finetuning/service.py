"""Interface between the fine-tuning API's operations and its use cases, without HTTP.

The gateway is a layer below the use cases (docs/design/architecture.md), so they are injected at deployment: an
`Opening` creates a `Service` from a home folder and the endpoint's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from llm_ray.conf.serve import FinetuningApi
from llm_ray.errors import LlmRayError

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
Method = Literal["supervised", "dpo"]
PREFIX = "ft:"
"""Prefix of the names of models made by jobs."""


class Problem(LlmRayError):
    """A request that fails, with an HTTP status, a message for the client, and the invalid field."""

    def __init__(self, status: int, message: str, code: str = "invalid_request", *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file. `label` is the client's file name; it is never used as a path here."""

    id: str
    label: str
    bytes: int
    created: int
    """Seconds since 1970, as all times here."""
    rows: int
    format: str
    suffix: str
    """File extension, such as `.jsonl`."""


@dataclass(frozen=True)
class Upload:
    """An upload in progress: where to write it, and its maximum size in bytes."""

    id: str
    path: Path
    most: int
    over: str
    """Error message for a larger file."""


@dataclass(frozen=True)
class Named:
    """A served model that a job can train from."""

    name: str
    folder: Path
    adapter: bool
    converted: bool
    """Whether the folder is not in Hugging Face form, and so cannot be trained."""


@dataclass(frozen=True)
class Asked:
    """A job as requested; None means auto or unset."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: Mapping[str, str] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    method: Method = "supervised"
    beta: float | None = None
    """For dpo."""
    conf: Mapping[str, Any] | None = None
    """Further keys of the finetune conf."""


@dataclass(frozen=True)
class Job:
    """A job's current state."""

    id: str
    asked: Asked
    state: State
    created: int
    run: str
    """Name of its run."""
    seed: int
    finished: int | None = None
    fine_tuned_model: str | None = None
    """Set once it has succeeded."""
    trained_tokens: int | None = None
    estimated_finish: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Event:
    """An event of a job. `data` holds a training step's metrics, if it is one."""

    id: str
    created: int
    level: Level
    message: str
    data: Mapping[str, float | int] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a job's run keeps, with its step's metrics."""

    id: str
    created: int
    step: int
    model: str
    metrics: Mapping[str, float]


class Service(Protocol):
    """The use cases. `owner` (from `owner_of`) owns the files and jobs; those of others are invisible. All methods
    may raise Problem and block, so call them in a thread."""

    def owner_of(self, key: str | None) -> str:
        """Returns the owner for an API key's name; without keys, all clients share one."""

    def begin(self, owner: str) -> Upload:
        """Reserves space for an upload."""

    def keep(self, owner: str, upload: Upload, label: str, form: str | None) -> StoredFile:
        """Checks the uploaded file and stores it; `form` is its format, if the client gave it."""

    def abandon(self, owner: str, upload: Upload) -> None:
        """Deletes an upload that was not kept, and ends its check."""

    def files(self, owner: str) -> Sequence[StoredFile]:
        """Returns files, oldest first."""

    def file(self, owner: str, id: str) -> StoredFile: ...

    def content(self, owner: str, id: str) -> Path: ...

    def delete_file(self, owner: str, id: str) -> None: ...

    def create(
        self, owner: str, key: str | None, asked: Asked, named: Named | None, *, any_model: bool, urgent: bool
    ) -> Job:
        """Enqueues a job, an `urgent` one ahead of others. `named` is the model if the endpoint serves it to this
        client; otherwise it is looked up in the registry, if `any_model`."""

    def jobs(self, owner: str) -> Sequence[Job]:
        """Returns jobs, oldest first."""

    def job(self, owner: str, id: str) -> Job: ...

    def cancel(self, owner: str, id: str) -> Job: ...

    def pause(self, owner: str, id: str) -> Job: ...

    def resume(self, owner: str, id: str) -> Job: ...

    def events(self, owner: str, id: str) -> Sequence[Event]:
        """Returns events, oldest first."""

    def checkpoints(self, owner: str, id: str) -> Sequence[Checkpoint]:
        """Returns checkpoints, oldest first."""

    def delete_model(self, owner: str, model: str, *, served: bool, any_owner: bool) -> str:
        """Deletes a model that a job made (anybody's if `any_owner`), and removes it from the endpoint if it is
        `served`; returns a message on what is kept."""

    def may_ask(self, owner: str, model: str) -> bool | None:
        """Whether this owner may use a model whose name begins with `PREFIX`; None if no job made it."""

    def recover(self) -> None:
        """Restarts jobs whose processes were killed."""


Opening = Callable[[Path, FinetuningApi], Service]
"""Creates the use cases for a home (the folder of models, data and runs) and the endpoint's settings."""
