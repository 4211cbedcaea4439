"""What the operations of the fine-tuning API ask for: values without HTTP, and the use cases behind them.

The gateway lies below the use cases (docs/design/architecture.md), so that it is given them when it is deployed: an
`Opening`, which makes a `Service` of a home and of the endpoint's settings.
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
"""What the names of models begin with that were made by jobs."""


class Problem(LlmRayError):
    """A request that is not done: an HTTP status, words for the client, and the field that is wrong."""

    def __init__(self, status: int, message: str, code: str = "invalid_request", *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class StoredFile:
    """A file that a client has sent. `label` is what the client called it, and no name of anything here."""

    id: str
    label: str
    bytes: int
    created: int
    """Seconds since 1970, as all times here."""
    rows: int
    format: str
    suffix: str
    """Of its kind, as `.jsonl`."""


@dataclass(frozen=True)
class Upload:
    """A file on its way: where its bytes are written, and how many it may have."""

    id: str
    path: Path
    most: int
    over: str
    """What to say of a file that has more."""


@dataclass(frozen=True)
class Named:
    """A model that the endpoint serves, as a job may name it."""

    name: str
    folder: Path
    adapter: bool
    converted: bool
    """Whether the folder is in another form than Hugging Face's, from which nothing can be trained."""


@dataclass(frozen=True)
class Asked:
    """A job as its client asks for it; None is auto, or not given."""

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
    """Of dpo."""
    conf: Mapping[str, Any] | None = None
    """Further keys of the finetune conf."""


@dataclass(frozen=True)
class Job:
    """A job as it stands."""

    id: str
    asked: Asked
    state: State
    created: int
    run: str
    """Name of its run."""
    seed: int
    finished: int | None = None
    fine_tuned_model: str | None = None
    """Once it has succeeded."""
    trained_tokens: int | None = None
    estimated_finish: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Event:
    """Something that has happened to a job. `data`: figures of a step, where it is one."""

    id: str
    created: int
    level: Level
    message: str
    data: Mapping[str, float | int] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a job's run keeps, with the figures of its step."""

    id: str
    created: int
    step: int
    model: str
    metrics: Mapping[str, float]


class Service(Protocol):
    """The use cases. `owner` is whose files and jobs are meant (`owner_of`): others' are not there. All raise Problem,
    and may take a while: call them in a thread."""

    def owner_of(self, key: str | None) -> str:
        """The owner for the name of an API key; without keys there is one."""

    def begin(self, owner: str) -> Upload:
        """Make room for a file that is being sent."""

    def keep(self, owner: str, upload: Upload, label: str, form: str | None) -> StoredFile:
        """Check the file that was sent, and keep it; `form` is its format, where that is told."""

    def abandon(self, owner: str, upload: Upload) -> None:
        """Forget a file that was not kept, and end its check."""

    def files(self, owner: str) -> Sequence[StoredFile]:
        """The oldest first."""

    def file(self, owner: str, id: str) -> StoredFile: ...

    def content(self, owner: str, id: str) -> Path: ...

    def delete_file(self, owner: str, id: str) -> None: ...

    def create(
        self, owner: str, key: str | None, asked: Asked, named: Named | None, *, any_model: bool, urgent: bool
    ) -> Job:
        """Put a job into the queue, `urgent` before those that are not. `named`: the model, where the endpoint serves it
        to this client; else it is one of the registry, if `any_model`."""

    def jobs(self, owner: str) -> Sequence[Job]:
        """The oldest first."""

    def job(self, owner: str, id: str) -> Job: ...

    def cancel(self, owner: str, id: str) -> Job: ...

    def pause(self, owner: str, id: str) -> Job: ...

    def resume(self, owner: str, id: str) -> Job: ...

    def events(self, owner: str, id: str) -> Sequence[Event]:
        """The oldest first."""

    def checkpoints(self, owner: str, id: str) -> Sequence[Checkpoint]:
        """The oldest first."""

    def delete_model(self, owner: str, model: str, *, served: bool, any_owner: bool) -> str:
        """Take a model away that a job has made, of whomever if `any_owner`, and from the endpoint if it is `served`;
        returns what is kept, in words."""

    def may_ask(self, owner: str, model: str) -> bool | None:
        """Whether a model whose name begins with `PREFIX` is this owner's; None where no job of anybody has made it."""

    def recover(self) -> None:
        """Have jobs go on whose processes were killed."""


Opening = Callable[[Path, FinetuningApi], Service]
"""Makes the use cases: of a home (the folder of models, data and runs), and settings of the endpoint."""
