"""The minimum memory of a training, computed from the conf and the model's files before anything is loaded."""

from __future__ import annotations

import psutil

from llm_ray.cluster import fit_workers, host_cluster
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import ConfError
from llm_ray.hardware import Precision, choose_precision, cpu_flags, has_bf16
from llm_ray.models.folder import check_folder
from llm_ray.models.load import Base

PROCESS_BYTES = 0.9e9
"""A worker's memory before it holds a model: Python, torch, transformers, Ray."""
_PACKED: dict[str | None, float] = {"int8": 1.0, "int4": 0.5}  # minimum bytes of a weight
_LEARNING = 4 + 4 + 8
"""Bytes of a trainable parameter: fp32 weight and gradient, and AdamW's two moments."""


def weight_precision(conf: FinetuneConf, precision: Precision, flags: frozenset[str]) -> Precision:
    """Returns the precision in which the base model is loaded: fp32 for full finetuning and for fsdp in fp32, else
    `model.dtype`, where `auto` is bf16 if the CPU has it and products use it. `precision`: that of matrix products."""
    if conf.tuning.method == "full" or (conf.training.strategy == "fsdp" and precision == "fp32"):
        return "fp32"
    if conf.model.dtype == "auto":
        return "bf16" if precision == "bf16" and has_bf16(flags) else "fp32"
    return conf.model.dtype


def bytes_of(precision: Precision) -> int:
    """Returns the bytes of a weight."""
    return {"fp32": 4, "bf16": 2}[precision]


def state_bytes(conf: FinetuneConf, frozen: float, trainable: int) -> float:
    """Returns the bytes of weights, gradients and optimizer in each worker. `frozen`: bytes of the base model's weights,
    counted only for LoRA; `trainable`: number of trainable parameters."""
    whole = (frozen if conf.tuning.method == "lora" else 0.0) + trainable * _LEARNING
    return whole / conf.runtime.workers if conf.training.strategy == "fsdp" else whole


def check_fits(conf: FinetuneConf, base: Base) -> None:
    """Raises ConfError or ClusterError if this host can never hold the training, ModelError if the model's files are
    incomplete.

    The check uses a lower bound, without LoRA's adapters and without activations. It is skipped for clusters, and for
    models that are not in a local folder or are a GGUF file.
    """
    if conf.runtime.mode != "local" or "train" not in conf.stages:
        return
    fit_workers(conf.runtime, host_cluster())
    if not base.location.folder or conf.model.gguf_file:
        return
    parameters = check_folder(base.location.folder, tokenizer=not conf.model.tokenizer).parameters
    flags = cpu_flags()
    precision = weight_precision(conf, choose_precision(conf.training.precision, flags)[0], flags)
    learning = parameters if conf.tuning.method == "full" else 0
    frozen = parameters * _PACKED.get(conf.model.weights, bytes_of(precision))
    per_worker = PROCESS_BYTES + state_bytes(conf, frozen, learning)
    total = float(psutil.virtual_memory().total)
    if per_worker * conf.runtime.workers > total:
        raise ConfError(
            f"{conf.name} needs at least {per_worker * conf.runtime.workers / 2**30:.1f} GiB of memory, and this host has "
            f"{total / 2**30:.1f} GiB: model.base {conf.model.base} has {parameters / 1e9:.2f} billion parameters, "
            f"tuning.method is {conf.tuning.method}, runtime.workers {conf.runtime.workers}. Try "
            + "; or ".join(with_fewer_weights(conf, per_worker, total))
        )


def with_fewer_weights(conf: FinetuneConf, per_worker: float, total: float) -> list[str]:
    """Returns ways to reduce the memory of weights, gradients and optimizer. `per_worker`: bytes
    of each worker; `total`: bytes of this host."""
    fitting = int(total // per_worker)
    ways = []
    if conf.runtime.mode == "local" and 1 <= fitting < conf.runtime.workers:
        ways.append(f"runtime.workers {fitting}, in place of {conf.runtime.workers}")
    if conf.tuning.method == "full":
        ways.append("tuning.method lora: optimizer and gradients only for small adapters")
    if conf.tuning.method == "lora" and not conf.model.weights and conf.training.strategy == "ddp":
        ways.append("model.weights int8 or int4: half or less than a third of the memory for frozen layers")
    if conf.runtime.mode == "local":
        ways.append("a cluster (runtime.mode cluster, training.strategy fsdp), which shards the weights")
    return [*ways, "a smaller model"]
