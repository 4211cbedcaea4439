"""Preference tuning (DPO, ORPO, KTO) with adapters: pairs per second and memory, against TRL's trainers.

    python -m benchmarks preferences --data dpo_en_demo.json --rows 48

For DPO and KTO, our side computes the base model's log-probabilities once, before the first step. That time is
included, since TRL computes them in every step. KTO takes each pair as a good and a bad answer, on both sides.
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
OBJECTIVES = ("dpo", "orpo", "kto")


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
    """Measures both sides of each objective one after the other, on all cores of this machine. `data` must contain
    preference pairs."""
    cores = len(os.sched_getaffinity(0))
    train = work / "pairs.jsonl"
    conf = _conf("dpo", model, train, work, cores)
    pairs = write_pairs(data, rows, load_tokenizer(find_base(conf.model, conf.paths)), train)
    figures: dict[str, Any] = {"pairs": pairs}
    table = []
    for objective in OBJECTIVES:
        ours = _train(_conf(objective, model, train, work, cores), pairs, cores)
        floor = run_trl("trl_preference_floor", objective, model, train, cores)
        floor["pairs_per_second"] = pairs / floor["seconds"]
        figures[objective] = {"ours": ours, "trl": floor}
        print(objective, figures[objective], flush=True)  # not lost if the rest is interrupted
        table += _compared(objective, pairs, ours, floor)
    return {**figures, "table": table}


def _conf(objective: str, model: Path, train: Path, work: Path, cores: int) -> FinetuneConf:
    return FinetuneConf.model_validate(
        {
            "name": f"preferences-{objective}",
            "model": {"base": str(model)},
            "paths": {"runs": str(work / "runs")},
            "data": {"train": [str(train)], "validation": None, "max_length": SETTINGS["max_length"]},
            "runtime": {"workers": 1, "cpus_per_worker": cores},
            "tuning": {
                "objective": objective,
                objective: {"beta": BETA},
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


def _train(conf: FinetuneConf, pairs: int, cores: int) -> dict[str, float]:
    base = find_base(conf.model, conf.paths)
    prepare(conf, load_tokenizer(base), conf.run_dir / "prepared", lambda line: None)
    with local_ray(cores) as cluster:
        outcome = run_training(conf, base, fit_workers(conf.runtime, cluster), None, Terminal())
    steps = [row for row in read_metrics(conf.run_dir / "metrics.jsonl") if "loss" in row]
    # Without the first step, which warms caches, as for the baseline.
    a_step = sum(row["seconds"] for row in steps[1:]) / (len(steps) - 1)
    return {
        "pairs_per_second": pairs / (a_step * len(steps) + outcome["reference_seconds"]),
        "reference_seconds": outcome["reference_seconds"],
        "step_seconds": a_step,
        "memory": max(row["memory_per_worker"] for row in steps),
        "loss_first": steps[0]["loss"],
        "loss": steps[-1]["loss"],
        "margin": steps[-1]["rewards/margins"],
    }


def _compared(objective: str, pairs: int, ours: dict[str, float], floor: dict[str, float]) -> list[dict[str, Any]]:
    name = f"{objective.upper()}, LoRA, {pairs} pairs"
    rows = [
        comparison(f"{name}: pairs/s against TRL", ours["pairs_per_second"], floor["pairs_per_second"], "3 x"),
        comparison(
            "the same: memory of the training process, GiB",
            ours["memory"] / 2**30,
            floor["memory"] / 2**30,
            "at most 1 x",
        ),
    ]
    if objective != "kto":  # of which TRL's steps may hold good answers alone, so that there is no margin
        rows.append(
            comparison(
                "the same: mean margin of rewards in the last step, thousandths",
                1000 * ours["margin"],
                1000 * floor["margin"],
                "",
            )
        )
    return rows
