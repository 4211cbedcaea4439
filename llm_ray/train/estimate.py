"""Estimates memory per worker and duration of a training before it starts.

Both are measured by running some real steps (``llm_ray.train.trial``). If the model would not even fit this host,
nothing is run, and memory is computed from the model's shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.prepare import DataStats, lengths_of, open_split
from llm_ray.errors import ConfError
from llm_ray.hardware import choose_precision, cpu_flags
from llm_ray.models.load import Base, load_empty_model
from llm_ray.progress import duration
from llm_ray.train.batches import micro_batch_tokens, plan_steps
from llm_ray.train.fits import PROCESS_BYTES, bytes_of, state_bytes, weight_precision
from llm_ray.train.model import add_adapters, learning_modules
from llm_ray.train.objectives import objective_of
from llm_ray.train.trial import measure

RAY_BYTES = 0.15e9
"""Memory of a Ray worker beyond that of the same process without Ray."""


@dataclass(frozen=True)
class Estimate:
    """parameters, trainable: counts. memory_per_worker: peak, bytes. seconds: training with validations, without
    evaluation; None if no steps were run. step_seconds: the optimizer steps' part of them. learning: a line per kind of
    trained layer."""

    parameters: int
    trainable: int
    precision: str
    precision_reason: str
    steps: int
    tokens: int
    memory_per_worker: float
    memory_here: float
    seconds: float | None
    step_seconds: float | None
    learning: list[str]
    unmeasured: str = ""
    """Why no steps were run; empty if some were."""
    notes: tuple[str, ...] = ()
    """Notes from the measured steps, for the user."""

    def memory(self, conf: FinetuneConf) -> float:
        """Returns the peak memory of all workers on this host, in bytes; for a cluster, of one worker."""
        return self.memory_per_worker * (conf.runtime.workers if conf.runtime.mode == "local" else 1)

    def fits(self, conf: FinetuneConf) -> bool:
        """Whether this host has enough memory."""
        return self.memory(conf) < self.memory_here

    def lines(self, conf: FinetuneConf) -> list[str]:
        """Returns the figures for the user, a line each."""
        workers = conf.runtime.workers
        fits = "" if self.fits(conf) else ": TOO MUCH for this host"
        lines = [
            f"{self.trainable:,} of {self.parameters:,} parameters are trained "
            f"({self.trainable / self.parameters:.2%})",
            f"precision {self.precision}: {self.precision_reason}",
            f"{self.steps} steps, {self.tokens:,} tokens",
            f"memory about {self.memory_per_worker / 2**30:.1f} GiB for each of {workers} worker(s); this host has "
            f"{self.memory_here / 2**30:.1f} GiB{fits}",
        ]
        if self.seconds is None or self.step_seconds is None:
            return [*lines, f"duration not measured: {self.unmeasured}"]
        like = "here" if conf.runtime.mode == "local" else "on hosts like this one, without network overhead"
        validation = self.seconds - self.step_seconds
        what = "validation and the base model's log-probabilities" if objective_of(conf).reference else "validation"
        parts = f", {duration(validation)} of it {what}" if validation > 1 else ""
        return [
            *lines,
            *self.notes,
            f"training about {duration(self.seconds)} {like}{parts} (measured over some steps)",
        ]


def estimate(conf: FinetuneConf, base: Base, data: DataStats, prepared: Path, cpus: int) -> Estimate:
    """Estimates the training stage with `cpus` per worker, from the rows in `prepared`. `conf` must not contain `auto`.
    Raises LlmRayError."""
    flags = cpu_flags()
    precision, reason = choose_precision(conf.training.precision, flags)
    causal = load_empty_model(base, torch.float32)
    parameters = sum(p.numel() for p in causal.parameters())
    config = causal.config.get_text_config()
    frozen_bytes = bytes_of(weight_precision(conf, precision, flags))
    frozen = parameters * frozen_bytes - saved_bytes(causal, conf, frozen_bytes)
    model: nn.Module = add_adapters(causal, conf.tuning.lora) if conf.tuning.method == "lora" else causal
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learning = learning_modules(model)

    schedule, steps = plan_steps(conf, lengths_of(open_split(prepared, "train")))
    tokens = round(data.train.tokens * steps / schedule.steps_per_epoch)
    memory = float(psutil.virtual_memory().total)

    weights = state_bytes(conf, frozen, trainable)
    local_workers = conf.runtime.workers if conf.runtime.mode == "local" else 1
    free = psutil.virtual_memory().available
    unmeasured = "" if "train" in conf.stages else "stages does not include train"
    if weights * local_workers > free:
        need = f"{weights * local_workers / 2**30:.1f} GiB of weights, gradients and optimizer"
        unmeasured = f"{need} exceed the {free / 2**30:.1f} GiB that are free on this host"
    planned = Estimate(
        parameters=parameters,
        trainable=trainable,
        precision=precision,
        precision_reason=reason,
        steps=steps,
        tokens=tokens,
        memory_per_worker=PROCESS_BYTES + weights + _activations(conf, config, data),
        memory_here=memory,
        seconds=None,
        step_seconds=None,
        learning=learning,
        unmeasured=unmeasured,
    )
    if unmeasured:
        return planned
    cost = measure(conf, base, prepared, cpus)
    step_seconds = tokens * cost.seconds_per_token + cost.first_step_seconds
    validations = 1 + steps / (conf.training.validate_every or schedule.steps_per_epoch)
    validated = data.validation.tokens * validations if data.validation else 0
    if objective_of(conf).reference:  # one forward pass over all answers for the base model's log-probabilities
        validated += data.train.tokens + (data.validation.tokens if data.validation else 0)
    if conf.tuning.mismatches:  # as many tokens again, of prompts with the answers of other rows
        validated *= 2
    return replace(
        planned,
        memory_per_worker=cost.memory + RAY_BYTES,
        seconds=step_seconds + validated * cost.validation_seconds_per_token,
        step_seconds=step_seconds,
        notes=cost.notes,
    )


def saved_bytes(empty: PreTrainedModel, conf: FinetuneConf, frozen_bytes: float) -> float:
    """Returns the bytes that `model.weights` saves over weights of `frozen_bytes` each. Raises ModelError if the model
    does not support it."""
    if not conf.model.weights:
        return 0.0
    from llm_ray.models.fewbits import BYTES, check_few_bits

    packed = check_few_bits(empty, conf.model.base, conf.model.weights, conf.tuning.lora.modules_to_save)
    return packed * (frozen_bytes - BYTES[conf.model.weights])


def _activations(conf: FinetuneConf, config: object, data: DataStats) -> float:
    """Estimates the bytes of activations that a forward pass keeps for the backward pass."""
    width = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not width or not layers:
        raise ConfError(f"model.base {conf.model.base}: its configuration has no hidden_size or num_hidden_layers")
    inner = getattr(config, "intermediate_size", None) or 4 * width
    tokens = min(micro_batch_tokens(conf), data.train.tokens)
    layer = 4.0 * tokens * (8 * width + 6 * inner)
    return layer + layers * 4 * tokens * width if conf.training.gradient_checkpointing else layers * layer
