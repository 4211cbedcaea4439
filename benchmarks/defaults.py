"""Loss on unseen rows with the values chosen by `auto` against the peers' defaults, for adapters and full finetuning.

    python -m benchmarks defaults --data alpaca_en_demo.json --rows 500

llm-ray trains all of them (`benchmarks training` compares its losses with TRL's own), so only the settings differ.
`auto` gets the same rows and no settings.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.ours import held_out_loss
from benchmarks.table import comparison
from benchmarks.training import conversations
from llm_ray.app.finetune import run_finetune
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.load import load_finetune
from llm_ray.data.prepare import prepare
from llm_ray.models.load import find_base, load_tokenizer
from llm_ray.runs.metrics import read_metrics

_STAGES = ["stages=[prepare,train,export]"]
HELD_OUT = 200  # rows following the training rows
_THREE_EPOCHS = ["training.epochs=3", "training.global_batch_size=8", "data.validation=null"]
# trl 1.16.0: SFTConfig (rate 2e-5, linear, no warmup), and ModelConfig for adapters (on peft's default layers).
_TRL = [*_THREE_EPOCHS, "training.learning_rate=2e-5", "training.schedule=linear", "training.warmup=0"]
PEERS: dict[str, dict[str, list[str]]] = {
    "TRL": {
        "lora": [
            *_TRL,
            "tuning.lora.r=16",
            "tuning.lora.alpha=32",
            "tuning.lora.dropout=0.05",
            "tuning.lora.target_modules=[q_proj, v_proj]",
        ],
        "full": _TRL,
    },
    # LLaMA-Factory's examples/train_lora and train_full: cosine, warmup over a tenth of the steps.
    "LLaMA-Factory": {
        "lora": [
            *_THREE_EPOCHS,
            "training.learning_rate=1e-4",
            "training.warmup=0.1",
            "tuning.lora.r=8",
            "tuning.lora.alpha=16",
            "tuning.lora.dropout=0",
        ],
        "full": [*_THREE_EPOCHS, "training.learning_rate=1e-5", "training.warmup=0.1"],
    },
}


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures loss on `HELD_OUT` rows, epochs and minutes, for each method and side, trained on the first `rows` rows
    of `data`."""
    lines = [
        json.dumps({"messages": content.messages}, ensure_ascii=False) + "\n"
        for content in itertools.islice(conversations(data), rows + HELD_OUT)
    ]
    train, held_out = work / "train.jsonl", work / "held-out.jsonl"
    train.write_text("".join(lines[:rows]), encoding="utf-8")
    held_out.write_text("".join(lines[rows:]), encoding="utf-8")

    asked = _conf("lora", "held-out", model, held_out, work, ["data.validation=null"])
    prepare(asked, load_tokenizer(find_base(asked.model, asked.paths)), asked.run_dir / "prepared", lambda line: None)
    figures: dict[str, Any] = {"before": held_out_loss(model, asked.run_dir / "prepared")}
    table = []
    for method in ("lora", "full"):
        sides: dict[str, Any] = {}
        for side, settings in {"auto": [], **{peer: confs[method] for peer, confs in PEERS.items()}}.items():
            conf = _conf(method, f"{method}-{side}", model, train, work, settings)
            began = time.monotonic()
            run = run_finetune(conf, Terminal())
            steps = [step for step in read_metrics(run / "metrics.jsonl") if "loss" in step]
            sides[side] = {
                "loss": held_out_loss(run / "output", asked.run_dir / "prepared"),
                "epochs": steps[-1]["epoch"],
                "minutes": (time.monotonic() - began) / 60,
            }
            print(method, side, sides[side], flush=True)  # not lost if the rest is interrupted
        figures[method] = sides
        for peer in PEERS:
            ours, floor = sides["auto"]["loss"], sides[peer]["loss"]
            table.append(
                comparison(
                    f"{method}, {rows} rows: loss on {HELD_OUT} unseen rows, auto against {peer}'s defaults",
                    ours,
                    floor,
                    "at most 1.01 x",
                )
            )
    return {**figures, "table": table}


def _conf(method: str, name: str, model: Path, data: Path, work: Path, settings: list[str]) -> FinetuneConf:
    return load_finetune(method, [f"train={data}", f"name={name}", f"model={model}", *_STAGES, *settings], home=work)
