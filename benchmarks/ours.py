"""A short training by llm-ray, measured from its metrics.jsonl, and the loss and answers of the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_ray.cli.terminal import Terminal
from llm_ray.cluster import fit_workers, local_ray
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.formats import Conversation
from llm_ray.data.prepare import Split, open_split, prepare
from llm_ray.evaluate.generate import answers
from llm_ray.models.load import find_base, load_tokenizer
from llm_ray.quickstart.judge import is_right
from llm_ray.runs.metrics import read_metrics
from llm_ray.train.batches import collate
from llm_ray.train.launch import run_training
from llm_ray.train.loss import SupervisedLoss

SETTINGS = {"r": 8, "alpha": 16, "learning_rate": 2e-5, "max_length": 512, "rows_per_step": 8}
"""Settings of both sides: TRL's default rate and batch size, LoRA on all linear layers."""


def train(
    name: str, model: Path, data: Path, held_out: Path, work: Path, workers: int, cpus: int, seed: int = 42
) -> dict[str, Any]:
    """Trains one epoch; returns real tokens per second (without the first step, which warms caches) and validation loss
    before and after."""
    conf = FinetuneConf.model_validate(
        {
            "name": name,
            "model": {"base": str(model)},
            "paths": {"runs": str(work / "runs")},
            "data": {"train": [str(data)], "validation": [str(held_out)], "max_length": SETTINGS["max_length"]},
            "runtime": {"workers": workers, "cpus_per_worker": cpus},
            "tuning": {"lora": {"r": SETTINGS["r"], "alpha": SETTINGS["alpha"], "dropout": 0.0}},
            "training": {
                "epochs": 1,
                "global_batch_size": SETTINGS["rows_per_step"],
                "learning_rate": SETTINGS["learning_rate"],
                "schedule": "linear",
                "warmup": 0,
                "seed": seed,
            },
        }
    )
    base = find_base(conf.model, conf.paths)
    prepare(conf, load_tokenizer(base), conf.run_dir / "prepared", lambda line: None)
    with local_ray(workers * cpus) as cluster:
        run_training(conf, base, fit_workers(conf.runtime, cluster), None, Terminal())
    rows = read_metrics(conf.run_dir / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row][1:]
    validations = [row["validation_loss"] for row in rows if "validation_loss" in row]
    tokens, seconds = sum(row["tokens"] for row in steps), sum(row["seconds"] for row in steps)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "loss_before": validations[0],
        "loss_after": validations[-1],
    }


def held_out_loss(folder: Path, prepared: Path) -> float:
    """Returns the mean loss of the supervised tokens in `prepared`, a folder of prepared training rows, by the model in
    `folder` in fp32."""
    return mean_loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prepared, "train")


def right_share(
    folder: Path, asked: Sequence[tuple[str, Sequence[str]]], *, system: str | None = None, max_new_tokens: int
) -> float:
    """Returns the share of questions that the model in `folder` answers correctly in fp32. Each question comes with
    what its answer must contain (`llm_ray.quickstart.judge`)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = [{"role": "system", "content": system}] if system else []
    questions = [Conversation([*before, {"role": "user", "content": prompt}], None) for prompt, _ in asked]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = answers(model, tokenizer, questions, max_new_tokens=max_new_tokens, batch_size=16)
    return sum(is_right(answer, expect) for answer, (_, expect) in zip(given, asked, strict=True)) / len(asked)


def mean_loss(causal: Any, prepared: Path, split: Split) -> float:
    """Returns the mean loss of the supervised tokens in a split of `prepared`."""
    rows = open_split(prepared, split)
    module = SupervisedLoss(causal, causal.eval(), packed=False)
    loss, supervised = 0.0, 0
    with torch.no_grad():
        for index in range(len(rows)):
            batch = collate(rows, [index], packed=False)
            loss += module(batch).item()
            supervised += len(batch.targets)
    return loss / supervised
