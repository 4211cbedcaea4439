"""Preference tuning (DPO) with adapters: pairs per second and final loss, against TRL's DPOTrainer.

    python -m benchmarks preferences --data dpo_en_demo.json --rows 48

Our side computes the base model's log-probabilities once, before the first step. That time is included, since TRL
computes them in every step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.ours import SETTINGS
from benchmarks.table import comparison
from benchmarks.training import run_trl
from llm_ray.cli.terminal import Terminal
from llm_ray.cluster import fit_workers, local_ray
from llm_ray.conf.finetune import Data, FinetuneConf
from llm_ray.data.formats import Formatter, Pair
from llm_ray.data.prepare import prepare
from llm_ray.data.sources import read
from llm_ray.models.load import find_base, load_tokenizer
from llm_ray.runs.metrics import read_metrics
from llm_ray.train.launch import run_training

BETA, RATE = 0.1, 1e-5


def write_pairs(data: Path, count: int, tokenizer: Any, file: Path) -> int:
    """Writes the first pairs of `data` that fit, as conversations that both sides read; returns their number."""
    formatter = Formatter(Data(train=(str(data),)), "pairs")
    lines: list[str] = []
    for row in read(str(data), on_bad_row=lambda error: None):
        pair = formatter(row)
        if not isinstance(pair, Pair):
            continue
        sides = [pair.chosen.messages, pair.rejected.messages]
        lengths = [len(tokenizer.apply_chat_template(side, return_dict=True)["input_ids"]) for side in sides]
        if max(lengths) < int(SETTINGS["max_length"]):
            prompt, (chosen, rejected) = sides[0][: pair.shared], (side[pair.shared :] for side in sides)
            lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False))
        if len(lines) == count:
            break
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures both sides one after the other, on all cores of this machine. `data` must contain preference pairs."""
    cores = len(os.sched_getaffinity(0))
    train = work / "pairs.jsonl"
    conf = FinetuneConf.model_validate(
        {
            "name": "preferences",
            "model": {"base": str(model)},
            "paths": {"runs": str(work / "runs")},
            "data": {"train": [str(train)], "validation": None, "max_length": SETTINGS["max_length"]},
            "runtime": {"workers": 1, "cpus_per_worker": cores},
            "tuning": {
                "objective": "dpo",
                "dpo": {"beta": BETA},
                "lora": {"r": SETTINGS["r"], "alpha": SETTINGS["alpha"], "dropout": 0.0},
            },
            "training": {
                "epochs": 1,
                "global_batch_size": SETTINGS["rows_per_step"],
                "learning_rate": RATE,
                "schedule": "linear",
                "warmup": 0,
                "precision": "bf16",
            },
        }
    )
    base = find_base(conf.model, conf.paths)
    pairs = write_pairs(data, rows, load_tokenizer(base), train)
    prepare(conf, load_tokenizer(base), conf.run_dir / "prepared", lambda line: None)
    with local_ray(cores) as cluster:
        outcome = run_training(conf, base, fit_workers(conf.runtime, cluster), None, Terminal())
    given = _ours(conf, pairs, outcome["reference_seconds"])
    floor = run_trl("trl_dpo_floor", model, train, cores)
    table = [
        comparison(
            f"DPO, LoRA, {pairs} pairs: pairs/s against TRL",
            given["pairs_per_second"],
            floor["pairs_per_second"],
            "3 x",
        ),
        comparison(
            "the same: memory of the training process, GiB",
            given["memory"] / 2**30,
            floor["memory"] / 2**30,
            "at most 1 x",
        ),
        comparison(
            "the same: mean margin of rewards in the last step, thousandths",
            1000 * given["margin"],
            1000 * floor["margin"],
            "",
        ),
    ]
    return {"ours": given, "trl": floor, "table": table}


def _ours(conf: FinetuneConf, pairs: int, reference: float) -> dict[str, float]:
    steps = [row for row in read_metrics(conf.run_dir / "metrics.jsonl") if "loss" in row]
    # Without the first step, which warms caches, as for the baseline.
    a_step = sum(row["seconds"] for row in steps[1:]) / (len(steps) - 1)
    return {
        "pairs_per_second": pairs / (a_step * len(steps) + reference),
        "reference_seconds": reference,
        "step_seconds": a_step,
        "memory": max(row["memory_per_worker"] for row in steps),
        "loss_first": steps[0]["loss"],
        "loss": steps[-1]["loss"],
        "margin": steps[-1]["rewards/margins"],
    }
