"""A dry run's estimates of time and memory, against the training that follows: LoRA, full, fsdp with two workers,
packed and padded, and a base in few bits.

ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks estimates     # as on a CPU without AVX-512
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import comparison
from benchmarks.training import messages, write_rows
from llm_ray.cli.terminal import Terminal
from llm_ray.cluster import fit_workers, local_ray
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.prepare import prepare
from llm_ray.models.load import find_base, load_tokenizer
from llm_ray.runs.metrics import read_metrics
from llm_ray.train.estimate import estimate
from llm_ray.train.launch import run_training

_FSDP: dict[str, dict[str, Any]] = {"training": {"strategy": "fsdp"}, "runtime": {"workers": 2}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "lora, padded": {"data": {"packing": False}},
    "lora, fp32": {"training": {"precision": "fp32"}},
    "full": {"tuning": {"method": "full"}},
    "full, fsdp over two workers": {"tuning": {"method": "full"}, **_FSDP},
    "lora, fsdp over two workers": _FSDP,
    "lora, int8 base": {"model": {"weights": "int8"}},
}


def measure(model: Path, data: Path, rows: int, work: Path, cases: Sequence[str] = tuple(CASES)) -> dict[str, Any]:
    """Estimates each of ``cases``, then trains it for the estimated number of steps."""
    train = messages(write_rows(data, rows, work)[0])
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, Any] = {}
    table = []
    for number, name in enumerate(cases):
        sections = CASES[name]
        settings: dict[str, Any] = {
            "model": {"base": str(model)},
            "paths": {"runs": str(work / "runs")},
            "data": {"train": [str(train)], "validation": None, "max_length": 512},
            "training": {"epochs": 2, "global_batch_size": 8, "learning_rate": 1e-5},
            "runtime": {"workers": 1},
        }
        merged = {key: settings.get(key, {}) | sections.get(key, {}) for key in {*settings, *sections}}
        conf = FinetuneConf.model_validate({"name": f"estimate-{number}", **merged})
        prepared = conf.run_dir / "prepared"
        base = find_base(conf.model, conf.paths)
        stats = prepare(conf, load_tokenizer(base), prepared, lambda line: None)
        cpus = cores // conf.runtime.workers
        estimated = estimate(conf, base, stats, prepared, cpus)
        with local_ray(cores) as cluster:
            runtime = conf.runtime.model_copy(update={"cpus_per_worker": cpus})
            run_training(conf, base, fit_workers(runtime, cluster), None, Terminal())
        steps = [row for row in read_metrics(conf.run_dir / "metrics.jsonl") if "loss" in row]
        measured = {
            "seconds": sum(row["seconds"] for row in steps),
            "memory": max(row["memory_per_worker"] for row in steps),
        }
        figures[name] = {
            "estimated": {"seconds": estimated.step_seconds, "memory": estimated.memory_per_worker},
            "measured": measured,
        }
        table += [
            comparison(
                f"{name}: seconds of all steps, estimated against measured",
                estimated.step_seconds or 0.0,
                measured["seconds"],
                "within 25 %",
            ),
            comparison(
                f"{name}: GiB per worker, estimated against measured",
                estimated.memory_per_worker / 2**30,
                measured["memory"] / 2**30,
                "within 15 %",
            ),
        ]
    return {**figures, "table": table}
