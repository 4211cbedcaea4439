"""The fine-tuning API's objects in OpenAI's form.

Source: https://platform.openai.com/docs/api-reference/fine-tuning and /files
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from llm_ray.serve.gateway.finetuning.service import Asked, Checkpoint, Event, Job, Method, StoredFile


class Listed(BaseModel):
    """An element of a list."""

    id: str


L = TypeVar("L", bound=Listed)


class Strict(BaseModel):
    """Part of a request; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class HyperparametersAsked(Strict):
    """Training hyperparameters; other settings go into `conf`."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] = "auto"


class SupervisedAsked(Strict):
    """Settings of method supervised."""

    hyperparameters: HyperparametersAsked | None = None


class DpoHyperparametersAsked(HyperparametersAsked):
    """Hyperparameters for training on preference pairs."""

    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] = "auto"


class DpoAsked(Strict):
    """Settings of method dpo."""

    hyperparameters: DpoHyperparametersAsked | None = None


class MethodAsked(Strict):
    """Training method: supervised, or dpo on preference pairs. Other methods are rejected."""

    type: str
    supervised: SupervisedAsked | None = None
    dpo: DpoAsked | None = None
    reinforcement: dict[str, Any] | None = None


class CreateJob(Strict):
    """Request to create a job."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m-instruct", "training_file": "file-abc", "suffix": "bot"}]
        }
    )

    model: Annotated[str, Field(min_length=1, max_length=300)]
    training_file: Annotated[str, Field(max_length=100)]
    validation_file: Annotated[str, Field(max_length=100)] | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] | None = Field(
        None, description="Part of the model's name: letters, digits, '.', '_' and '-'."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    method: MethodAsked | None = None
    hyperparameters: HyperparametersAsked | None = Field(None, description="As in method; the older place for it.")
    integrations: list[Any] | None = Field(None, description="None are there: null, or an empty list.")
    conf: dict[str, Any] | None = Field(
        None,
        description="Further keys of the finetune conf, as {'tuning': {'lora': {'r': 32}}} or {'tuning.lora.r': 32}.",
    )


class FileObject(Listed):
    """An uploaded file."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str = Field(description="As its client called it.")
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None
    format: str = Field(description="The format that its rows have.")
    rows: int


class ModelDeleted(BaseModel):
    """Confirmation that a model was deleted."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
    kept: str = Field(description="What is kept of it, in words.")


class FileDeleted(BaseModel):
    """Confirmation that a file was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Hyperparameters(BaseModel):
    """Hyperparameters as requested."""

    n_epochs: Literal["auto"] | int
    batch_size: Literal["auto"] | int
    learning_rate_multiplier: Literal["auto"] | float


class Supervised(BaseModel):
    """Settings of method supervised."""

    hyperparameters: Hyperparameters


class DpoHyperparameters(Hyperparameters):
    """Hyperparameters as requested."""

    beta: Literal["auto"] | float


class Dpo(BaseModel):
    """Settings of method dpo."""

    hyperparameters: DpoHyperparameters


class MethodObject(BaseModel):
    """Training method."""

    type: Method
    supervised: Supervised | None = None
    dpo: Dpo | None = None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobObject(Listed):
    """A fine-tuning job."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: str | None = Field(description="The model's name, once the job has succeeded.")
    organization_id: Literal["llm-ray"] = "llm-ray"
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: Hyperparameters
    method: MethodObject
    seed: int
    trained_tokens: int | None
    error: JobError | None
    metadata: dict[str, str] | None
    integrations: list[Any]
    user_provided_suffix: str | None
    run: str = Field(description="The run, as llm-ray runs shows it on the machine.")


class EventObject(Listed):
    """An event of a job."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, float | int]


class CheckpointObject(Listed):
    """A checkpoint of a job."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


class Page(BaseModel, Generic[L]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[L]
    has_more: bool
    first_id: str | None
    last_id: str | None


def file_object(file: StoredFile) -> FileObject:
    """Returns the API object of a file."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created,
        filename=file.label,
        format=file.format,
        rows=file.rows,
    )


def job_object(job: Job) -> JobObject:
    """Returns the API object of a job."""
    asked = job.asked
    hyperparameters = Hyperparameters(
        n_epochs=asked.epochs or "auto",
        batch_size=asked.batch_size or "auto",
        learning_rate_multiplier=asked.learning_rate_multiplier or "auto",
    )
    if asked.method == "dpo":
        with_beta = DpoHyperparameters(**hyperparameters.model_dump(), beta=asked.beta or "auto")
        method = MethodObject(type="dpo", dpo=Dpo(hyperparameters=with_beta))
    else:
        method = MethodObject(type="supervised", supervised=Supervised(hyperparameters=hyperparameters))
    return JobObject(
        id=job.id,
        created_at=job.created,
        finished_at=job.finished,
        estimated_finish=job.estimated_finish,
        status=job.state,
        model=asked.model,
        fine_tuned_model=job.fine_tuned_model,
        training_file=asked.training_file,
        validation_file=asked.validation_file,
        result_files=[],
        hyperparameters=hyperparameters,
        method=method,
        seed=job.seed,
        trained_tokens=job.trained_tokens,
        error=JobError(code="job_failed", message=job.error) if job.error else None,
        metadata=dict(asked.metadata) if asked.metadata is not None else None,
        integrations=[],
        user_provided_suffix=asked.suffix,
        run=job.run,
    )


def event_object(event: Event) -> EventObject:
    """Returns the API object of an event."""
    return EventObject(
        id=event.id,
        created_at=event.created,
        level=event.level,
        message=event.message,
        type="metrics" if event.data else "message",
        data=dict(event.data or {}),
    )


def checkpoint_object(job: str, checkpoint: Checkpoint) -> CheckpointObject:
    """Returns the API object of a checkpoint."""
    return CheckpointObject(
        id=checkpoint.id,
        created_at=checkpoint.created,
        fine_tuning_job_id=job,
        fine_tuned_model_checkpoint=checkpoint.model,
        step_number=checkpoint.step,
        metrics=dict(checkpoint.metrics),
    )


def asked_of(body: CreateJob) -> Asked:
    """Converts a validated request to the service's form."""
    method: Method = "dpo" if body.method and body.method.type == "dpo" else "supervised"
    chosen = asked_of_method(body) or body.hyperparameters or HyperparametersAsked()
    beta = chosen.beta if isinstance(chosen, DpoHyperparametersAsked) else "auto"
    return Asked(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix or None,
        seed=body.seed,
        metadata=body.metadata,
        epochs=None if chosen.n_epochs == "auto" else chosen.n_epochs,
        batch_size=None if chosen.batch_size == "auto" else chosen.batch_size,
        learning_rate_multiplier=(
            None if chosen.learning_rate_multiplier == "auto" else chosen.learning_rate_multiplier
        ),
        method=method,
        beta=None if beta == "auto" else beta,
        conf=body.conf,
    )


def asked_of_method(body: CreateJob) -> HyperparametersAsked | None:
    """Returns the hyperparameters of the request's method, or None."""
    method = body.method
    chosen = (method.dpo if method.type == "dpo" else method.supervised) if method else None
    return chosen.hyperparameters if chosen else None
