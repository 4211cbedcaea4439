"""Baseline: TRL's SFTTrainer with its defaults on the same rows, in its own process. Prints one line of JSON.

    python -m benchmarks.trl_floor MODEL ROWS.jsonl PREPARED THREADS

PREPARED is our run's folder of prepared data: the loss after TRL's training is measured on the same tokens by the same
code.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.ours import SETTINGS, mean_loss


class Clock(TrainerCallback):
    """Records when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def adapters() -> LoraConfig:
    """Returns the adapter configuration of both sides."""
    return LoraConfig(
        r=int(SETTINGS["r"]), lora_alpha=int(SETTINGS["alpha"]), target_modules="all-linear", task_type="CAUSAL_LM"
    )


def main(model: str, rows: str, prepared: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                max_length=int(SETTINGS["max_length"]),
                report_to="none",
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=datasets.Dataset.from_json(rows),
            peft_config=adapters(),
            callbacks=[clock],
        )
        tokens = sum(min(len(row["input_ids"]), int(SETTINGS["max_length"])) for row in trainer.train_dataset)
        trainer.train()
    loss = mean_loss(trainer.model.get_base_model(), prepared, "validation")
    steps = len(clock.ends)
    seconds = clock.ends[-1] - clock.ends[0]  # without the first step, as on our side
    counted = tokens * (steps - 1) / steps
    print(
        json.dumps(
            {
                "tokens_per_second": counted / seconds,
                "tokens": counted,
                "seconds": seconds,
                "steps": steps,
                "loss_after": loss,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
