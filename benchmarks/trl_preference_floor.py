"""Baseline: TRL's trainer for an objective on the same pairs, in its own process. Prints one line of JSON.

python -m benchmarks.trl_preference_floor dpo|orpo|kto MODEL PAIRS.jsonl THREADS
"""

from __future__ import annotations

import json
import sys
import tempfile

import datasets
import psutil
import torch
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.ours import SETTINGS
from benchmarks.preferences import BETA, RATE
from benchmarks.trl_floor import Clock, adapters

TRAINERS = {"dpo": (DPOConfig, DPOTrainer), "orpo": (ORPOConfig, ORPOTrainer), "kto": (KTOConfig, KTOTrainer)}


class Memory(Clock):
    """Also records the maximum resident memory after any step, in bytes."""

    most = 0

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        super().on_step_end(*args, **kwargs)
        self.most = max(self.most, psutil.Process().memory_info().rss)


def main(objective: str, model: str, pairs: str, threads: int) -> None:
    torch.set_num_threads(threads)
    clock = Memory()
    config, trainer_of = TRAINERS[objective]
    rows = datasets.Dataset.from_json(pairs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            model=model,
            args=config(
                output_dir=folder,
                num_train_epochs=1,
                max_length=int(SETTINGS["max_length"]),
                learning_rate=RATE,
                beta=BETA,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=adapters(),
            callbacks=[clock],
        )
        trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    a_step = (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1)  # without the first step
    print(
        json.dumps(
            {
                "seconds": a_step * len(clock.ends),
                "step_seconds": a_step,
                "memory": clock.most,
                "loss_first": steps[0]["loss"],
                "loss": steps[-1]["loss"],
                "margin": steps[-1].get("rewards/margins"),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
