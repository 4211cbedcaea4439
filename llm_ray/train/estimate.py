"""What a training will need, told before it starts: memory per worker, and time.

Both are estimates. Memory is counted from the model's own shapes; time from the rate at which this host multiplies matrices, measured
for a moment in the precision to be used.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from llm_ray.conf.schema import FinetuneConf
from llm_ray.data.prepare import DataStats
from llm_ray.hardware import choose_precision, cpu_flags, torch_dtype
from llm_ray.models.load import load_empty_model
from llm_ray.train.batches import plan_steps
from llm_ray.train.model import add_adapters, weight_dtype

PROCESS_BYTES = 0.9e9
"""A worker's memory before it holds a model: Python, torch, transformers, Ray."""
EFFICIENCY = {"fp32": 0.6, "bf16": 0.15}
"""Share of the matrix rate that training reaches, measured on SmolLM2-135M (docs/reference/benchmarks.md); what is not a matrix product weighs more in bf16."""


@dataclass(frozen=True)
class Estimate:
    """parameters, trainable: counts. memory_per_worker: bytes. seconds: of training, without evaluation."""

    parameters: int
    trainable: int
    precision: str
    precision_reason: str
    steps: int
    tokens: int
    memory_per_worker: float
    memory_here: float
    seconds: float
    matrix_rate: float

    def lines(self, conf: FinetuneConf) -> list[str]:
        """The figures for people, a line each."""
        workers = conf.runtime.workers
        fits = (
            ""
            if self.memory_per_worker * (workers if conf.runtime.mode == "local" else 1) < self.memory_here
            else ": TOO MUCH for this host"
        )
        return [
            f"{self.trainable:,} of {self.parameters:,} parameters learn ({self.trainable / self.parameters:.2%})",
            f"precision {self.precision}: {self.precision_reason}",
            f"{self.steps} steps, {self.tokens:,} tokens",
            f"memory about {self.memory_per_worker / 2**30:.1f} GiB for each of {workers} worker(s); this host has {self.memory_here / 2**30:.1f} GiB{fits}",
            f"training about {_duration(self.seconds)} on hosts like this one ({self.matrix_rate / 1e9:.0f} GFLOP/s a worker in {self.precision})",
        ]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def estimate(conf: FinetuneConf, data: DataStats, cpus: int) -> Estimate:
    """Estimate the training stage with `cpus` a worker. Raises ModelError."""
    flags = cpu_flags()
    precision, reason = choose_precision(conf.training.precision, flags)
    causal = load_empty_model(conf.model, conf.paths, torch.float32)
    parameters = sum(p.numel() for p in causal.parameters())
    head = causal.get_output_embeddings()
    embedding = causal.get_input_embeddings().weight.numel()
    matrices = parameters - embedding + (embedding if head is not None and head.weight is causal.get_input_embeddings().weight else 0)
    config = causal.config.get_text_config()
    frozen_bytes = torch.finfo(weight_dtype(conf, precision, flags)).bits // 8
    model: nn.Module = add_adapters(causal, conf.tuning.lora) if conf.tuning.method == "lora" else causal
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    schedule, steps = plan_steps(conf, data.train.sequences)
    tokens = round(data.train.tokens * steps / schedule.steps_per_epoch)

    weights = (parameters if conf.tuning.method == "lora" else 0) * frozen_bytes + trainable * (4 + 4 + 8)
    if conf.training.strategy == "fsdp":
        weights /= conf.runtime.workers
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    batch_tokens = conf.training.batch_size * min(conf.data.max_length, data.train.tokens / data.train.sequences)
    layer = 4.0 * batch_tokens * (8 * width + 6 * inner)
    layers = config.num_hidden_layers
    activations = layer + layers * 4 * batch_tokens * width if conf.training.gradient_checkpointing else layers * layer

    rate = matrix_rate(torch_dtype(precision), cpus)
    backward = 2 if conf.tuning.method == "full" else 1  # frozen matrices need no gradient of their own
    passes = 1 + backward + (1 if conf.training.gradient_checkpointing else 0)
    seconds = 2.0 * matrices * passes * tokens / conf.runtime.workers / (rate * EFFICIENCY[precision])
    return Estimate(
        parameters=parameters,
        trainable=trainable,
        precision=precision,
        precision_reason=reason,
        steps=steps,
        tokens=tokens,
        memory_per_worker=PROCESS_BYTES + weights + activations,
        memory_here=float(psutil.virtual_memory().total),
        seconds=seconds,
        matrix_rate=rate,
    )


def matrix_rate(dtype: torch.dtype, cpus: int, seconds: float = 0.3) -> float:
    """Floating-point operations a second of matrix products in `dtype` on `cpus` of this host, measured for `seconds`."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(cpus, os.cpu_count() or 1)))
    try:
        a, b = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        a @ b
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            a @ b
            count += 1
        return count * 2 * 512 * 1024 * 1024 / elapsed
    finally:
        torch.set_num_threads(before)
