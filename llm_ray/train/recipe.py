"""The training function, which each Ray Train worker runs, from loading the model to the last checkpoint.

It reads top to bottom: set-up, resume, then steps of forward, backward, clip and update, with validation, checkpoints
and the stop signal in between. Longer parts are stateless functions in modules of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_ray import cores
from llm_ray.conf.finetune import EarlyStopping, FinetuneConf
from llm_ray.conf.section import as_run
from llm_ray.data.prepare import has_validation, lengths_of, open_split
from llm_ray.errors import LlmRayError, TrainError
from llm_ray.hardware import (
    Precision,
    choose_precision,
    cpu_flags,
    forget_peak_memory,
    keep_freed_memory,
    peak_memory,
    return_freed_memory,
    torch_dtype,
)
from llm_ray.models.load import Base
from llm_ray.runs.folder import stop_file
from llm_ray.runs.metrics import MetricsWriter
from llm_ray.train import checkpoint as checkpoints
from llm_ray.train.attention import why_not_packed
from llm_ray.train.batches import (
    Batch,
    Mismatches,
    collate,
    mismatches_of,
    passes_over,
    plan_steps,
    steps_of,
    whole_split,
)
from llm_ray.train.fits import weight_precision
from llm_ray.train.model import adapt, compile_layers, distribute, gradient_sync, load
from llm_ray.train.objectives import Objective, divergence_of
from llm_ray.train.optimizer import Optimizer, learning_rate, make_optimizer
from llm_ray.train.reference import reference_folder, reference_log_probabilities
from llm_ray.train.task import NOTES_FILE, Outcome, Task
from llm_ray.train.workers import OtherWorkerFailed, all_reduce, broadcast, gather_error, run_collectively, use_threads

_REFERENCE = (
    "before the first step, the base model's log-probabilities of all answers are computed, unless already stored"
)


@dataclass(frozen=True)
class Setup:
    module: nn.Module
    objective: Objective
    optimizer: Optimizer
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    packed: bool
    precision: Precision
    notes: list[str]
    """Remarks for the user on how training is computed."""


def train(task: Task) -> Outcome:
    """Trains on this worker. Called by Ray Train on every worker, and again after a failure."""
    conf = FinetuneConf.model_validate(task["conf"])
    folder = conf.run_dir / "checkpoint"
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()

    # Set-up: a problem on any worker ends the run on all of them, and names its host.
    setup, problem = None, None
    try:
        with contextlib.suppress(OtherWorkerFailed):  # that worker reports the problem
            setup = set_up(conf, task["base"], task["cpus"], rank, workers)
        training_data = open_split(conf.run_dir / "prepared", "train")
        validation_data = (
            open_split(conf.run_dir / "prepared", "validation") if has_validation(conf.run_dir / "prepared") else None
        )
    except (LlmRayError, OSError) as error:
        problem = f"{error} (worker {rank} on {socket.gethostname()})"
    if (failed := gather_error(problem)) or setup is None:
        return _before_steps("failed", failed or "")
    module, objective, optimizer = setup.module, setup.objective, setup.optimizer
    notes = [*setup.notes, *([_REFERENCE] if objective.reference else [])]
    if rank == 0 and notes:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{NOTES_FILE}.partial"
        partial.write_text("\n".join(notes), encoding="utf-8")
        partial.rename(folder / NOTES_FILE)
    training = conf.training
    schedule, total_steps = plan_steps(conf, lengths_of(training_data, padded=not setup.packed), setup.packed)
    validation_lengths = lengths_of(validation_data, padded=not setup.packed) if validation_data else None
    validate_every = training.validate_every or schedule.steps_per_epoch
    save_every = conf.checkpoint.every_steps or schedule.steps_per_epoch
    mismatches: dict[str, Mismatches] = {}
    if conf.tuning.mismatches:
        mismatches["train"] = mismatches_of(training_data, schedule.neighbours(), conf.data.max_length)
        if validation_data:
            mismatches["validation"] = whole_split(validation_data, conf.data.max_length)

    # The base model's log-probabilities, before any weight changes.
    reference: dict[str, Tensor] = {}
    began = time.perf_counter()
    if objective.reference:
        kept = broadcast(str(reference_folder(conf, task["base"], setup.precision)) if rank == 0 else "")
        for name, data in (("train", training_data), ("validation", validation_data)):
            if data is None:
                continue
            try:
                found_reference = reference_log_probabilities(
                    module,
                    data,
                    Path(kept) / name,
                    packed=setup.packed,
                    limit=schedule.limit,
                    rank=rank,
                    workers=workers,
                    autocast=setup.autocast,
                    stop=stop_file(conf.run_dir),
                    mismatches=mismatches.get(name),
                )
            except TrainError as error:  # raised by all workers
                return _before_steps("failed", str(error), total_steps)
            if found_reference is None:
                return _before_steps("stopped", "stopped before the first step as requested", total_steps)
            reference[name] = found_reference
    reference_seconds = time.perf_counter() - began if objective.reference else 0.0

    # Resume from the last complete checkpoint of this run, else from the requested one, else from the start. Rank 0
    # decides for all.
    found = checkpoints.list_checkpoints(folder)
    start_from = broadcast(str(found[-1]) if found else task["resume_from"])
    progress = checkpoints.Progress()
    torch.manual_seed(training.seed + rank)
    if start_from:
        try:
            progress = checkpoints.load(Path(start_from), module, optimizer, rank)
        except TrainError as error:  # raised by all workers
            return _before_steps("failed", str(error))
    metrics = (
        MetricsWriter(
            conf.run_dir,
            tensorboard=conf.tracking.tensorboard,
            resume_from_step=progress.step,
            perplexity=objective.likelihood,
        )
        if rank == 0
        else None
    )

    def outcome(status: Literal["done", "stopped", "failed"], reason: str = "") -> Outcome:
        return Outcome(
            status=status,
            reason=reason,
            step=progress.step,
            total_steps=total_steps,
            best_step=progress.best_step,
            best_validation_loss=progress.best_validation_loss,
            reference_seconds=reference_seconds,
        )

    def validate() -> dict[str, float]:
        """Returns the objective's figures over the validation data, with names prefixed by `validation_`; empty without
        validation data."""
        if validation_lengths is None:
            return {}
        sums, weight, divergence = torch.zeros(len(objective.figures), dtype=torch.float64), 0, 0.0
        if answers := mismatches.get("validation"):
            passes = passes_over(answers.lengths, schedule.limit, rank, workers)
            known = reference["validation"]
            divergence = estimate_divergence(
                setup, (collate(validation_data, indices, setup.packed, known, answers) for indices in passes)
            )
        module.eval()
        with torch.no_grad(), setup.autocast():
            for indices in passes_over(validation_lengths, schedule.limit, rank, workers):
                batch = collate(validation_data, indices, setup.packed, reference.get("validation"))
                sums += module(batch.with_divergence(divergence))
                weight += objective.weight(batch)
        module.train()
        *all_sums, all_weight = all_reduce(*sums.tolist(), weight)
        return {f"validation_{name}": mean for name, mean in objective.means(all_sums, all_weight).items()}

    def save() -> None:
        path = checkpoints.save(folder, module, optimizer, progress, rank)
        ray.train.report(
            {"step": progress.step},
            checkpoint=Checkpoint.from_directory(str(path)) if rank == 0 else None,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,  # it is already in the run's storage
        )
        if rank == 0:
            checkpoints.prune(folder, conf.checkpoint.keep)

    try:
        if progress.step == 0 and (before := validate()) and metrics:
            metrics.write({"step": 0, **before})
        saved_at = progress.step
        began = time.perf_counter()
        steps = (progress.step, total_steps, reference.get("train"))
        mismatched: Iterable[list[Batch]] = itertools.repeat([])
        if answers := mismatches.get("train"):
            of_answers = replace(schedule, lengths=answers.lengths)
            mismatched = steps_of(training_data, of_answers, rank, workers, *steps, answers)
        learned = steps_of(training_data, schedule, rank, workers, *steps)
        for batches, compared in zip(learned, mismatched, strict=False):
            forget_peak_memory()
            rate = learning_rate(conf, progress.step, total_steps)
            optimizer.set_rate(rate)

            sums, weight, tokens = accumulate(setup, batches, compared)

            # DDP and FSDP average the gradients of summed losses over the workers: rescale them to the mean over all
            # items of the objective (supervised tokens, pairs, or rated answers).
            stop = float(rank == 0 and stop_file(conf.run_dir).exists())
            memory = float(peak_memory())
            *sums, weight, tokens, stop, memory = all_reduce(*sums, weight, tokens, stop, memory)
            norm = average_gradients(module, workers / max(1.0, weight))
            figures = objective.means(sums, weight)
            mean_loss = figures["loss"]
            if not torch.isfinite(torch.tensor([mean_loss, norm])).all():
                kept = f"the checkpoint of step {saved_at} is intact" if saved_at else "there is no checkpoint yet"
                raise TrainError(
                    f"the loss at step {progress.step + 1} is {mean_loss:.3g} (gradient norm {norm:.3g}): {kept}. "
                    f"Lower training.learning_rate ({as_run(training.learning_rate):g}), lengthen training.warmup, or "
                    "use training.precision fp32; then start under another name, or with --force"
                )
            update(setup, norm, training.max_grad_norm)
            progress.step += 1

            seconds = time.perf_counter() - began
            row = {
                "step": progress.step,
                "total_steps": total_steps,
                "epoch": progress.step / schedule.steps_per_epoch,
                **figures,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": int(tokens),
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
                "memory_per_worker": int(memory / workers),
            }
            last = progress.step == total_steps
            patience = training.early_stopping if isinstance(training.early_stopping, EarlyStopping) else None
            if (last or progress.step % validate_every == 0) and (validated := validate()):
                row |= validated
                validation_loss = validated["validation_loss"]
                best = math.inf if progress.best_validation_loss is None else progress.best_validation_loss
                enough = validation_loss < best - (patience.min_delta if patience else 0.0)
                progress.validations_without_improvement = 0 if enough else progress.validations_without_improvement + 1
                if validation_loss < best:
                    progress.best_validation_loss, progress.best_step = validation_loss, progress.step
                    if training.best_checkpoint:
                        checkpoints.save_best(folder, module, rank)
            if metrics:
                metrics.write(row)
            early = bool(patience and progress.validations_without_improvement >= patience.patience)
            if last or early or stop or progress.step % save_every == 0:
                save()
                saved_at = progress.step
            if stop and not last:
                return outcome(
                    "stopped", f"stopped at step {progress.step} of {total_steps} as requested, with a checkpoint"
                )
            if early:
                return outcome(
                    "done",
                    f"validation loss has not fallen for {patience.patience if patience else 0} validations: stopped "
                    f"early at step {progress.step}",
                )
            began = time.perf_counter()
    except TrainError as error:  # raised by all workers at the same point
        return outcome("failed", str(error))
    finally:
        if metrics:
            metrics.close()
    return outcome("done")


def _before_steps(status: Literal["stopped", "failed"], reason: str, total_steps: int = 0) -> Outcome:
    """The outcome of a training that ends before its first step."""
    return Outcome(
        status=status,
        reason=reason,
        step=0,
        total_steps=total_steps,
        best_step=None,
        best_validation_loss=None,
        reference_seconds=0.0,
    )


def set_up(conf: FinetuneConf, base: Base, cpus: int, rank: int, workers: int) -> Setup:
    """Sets up threads, model, strategy and optimizer of this worker. Every worker must call it. Raises ModelError,
    ConfError, or OtherWorkerFailed if another worker could not load the model."""
    threads, _ = cores.bind(cpus)
    use_threads(threads)
    torch.set_float32_matmul_precision("highest")
    flags = cpu_flags()
    precision, _ = choose_precision(conf.training.precision, flags)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

    dtype = torch_dtype(weight_precision(conf, precision, flags))

    def load_base() -> tuple[PreTrainedModel, str]:
        causal = load(conf, base, dtype, rank)
        with autocast():  # with fsdp, only rank 0 has weights yet
            return causal, why_not_packed(causal) if conf.data.packing and rank == 0 else ""

    causal, why_not = run_collectively(load_base)
    why_not = broadcast(why_not)
    loss = adapt(conf, causal, dtype, packed=conf.data.packing and not why_not)
    if rank == 0:
        with autocast():
            loss.choose_blockwise()
    loss.blockwise = broadcast(loss.blockwise)
    notes = (
        [f"data.packing: rows are trained in padded batches, not packed, because of the model: {why_not}"]
        if why_not
        else []
    )
    if conf.training.compile:
        compile_layers(loss.causal)
    if conf.training.strategy == "fsdp":  # memory matters more than speed
        return_freed_memory()
    module = distribute(loss, conf, workers)
    if conf.training.strategy == "ddp":
        keep_freed_memory()
    module.train()
    return Setup(module, loss.objective, make_optimizer(module, conf), autocast, loss.packed, precision, notes)


def accumulate(
    setup: Setup, batches: list[Batch], mismatched: Sequence[Batch] = ()
) -> tuple[list[float], float, float]:
    """Runs the forward and backward passes of a step on this worker. Returns its sums of the objective's figures, their
    weight (number of supervised tokens, pairs, or rated answers), and its number of tokens. `mismatched`: what the
    divergence of the step is estimated on, if the objective needs it; then every worker must call it."""
    divergence = estimate_divergence(setup, mismatched) if mismatched else 0.0
    sums, weight, tokens = torch.zeros(len(setup.objective.figures), dtype=torch.float64), 0.0, 0.0
    for number, batch in enumerate(batches):
        with gradient_sync(setup.module, last=number == len(batches) - 1):
            with setup.autocast():
                figures: Tensor = setup.module(batch.with_divergence(divergence))
            figures[0].backward()
        sums += figures.detach()
        weight += setup.objective.weight(batch)
        tokens += batch.tokens
    return sums.tolist(), weight, tokens


def estimate_divergence(setup: Setup, mismatched: Iterable[Batch]) -> float:
    """Returns the divergence of the model from its base, in nats, estimated on these batches of all workers (see
    :func:`divergence_of`). Every worker must call it, with as many batches."""
    ratios, rows = 0.0, 0
    training = setup.module.training
    setup.module.eval()
    with torch.no_grad(), setup.autocast():
        for batch in mismatched:
            given = setup.module(batch, log_probabilities=True)
            if batch.ratings and len(batch.ratings.good):
                ratios += float((given - batch.ratings.reference).double().sum())
                rows += len(batch.ratings.good)
    setup.module.train(training)
    return divergence_of(*all_reduce(ratios, rows))


def average_gradients(module: nn.Module, factor: float) -> float:
    """Scales the gradients by `factor`; returns their norm over all workers."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor)
    norm = nn.utils.get_total_norm(gradients)
    # With FSDP it is a DTensor, of which each worker has a part.
    return float(norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm)


def update(setup: Setup, norm: float, max_norm: float | None) -> None:
    """Runs an optimizer step, with gradients clipped from `norm` to `max_norm`."""
    if max_norm:
        torch._foreach_mul_(
            [p.grad for p in setup.module.parameters() if p.grad is not None], min(1.0, max_norm / (norm + 1e-6))
        )
    setup.optimizer.step()
    setup.optimizer.zero_grad()
