"""Hyperparameters set to `auto`: epochs, batch and learning rate, chosen from the data, the method and the model.

    choice = choose(conf, read_stats(run_dir / "prepared"), width=576)
    choice.conf.training.epochs, choice.reasons["training.epochs"]

The rules and what they were measured on: docs/design/training.md, "What auto chooses".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llm_ray.conf.finetune import EarlyStopping, FinetuneConf
from llm_ray.conf.objectives import ObjectiveName
from llm_ray.data.prepare import DataStats
from llm_ray.runs.folder import flat

RULES = 1
"""Number of this set of rules: another one makes another training of the same conf."""

# Schulman et al. 2025, "LoRA Without Regret": the best rate for full weights is about 5e-5 at width 2000 and falls with
# the width, the one for adapters is 10 times as high, and 15 times in runs of few steps.
FULL_RATE, RATE_WIDTH, RATE_EXPONENT = 5e-5, 2000, 0.78
LORA_FACTOR, SHORT_RUN_FACTOR = 10, 1.5
SMALL = 200
"""Rows below which a set is small: few steps, no validation."""
DROPOUT, DROPOUT_ROWS = 0.1, 500  # and the rows below which adapters have it
BATCHES = ((SMALL, 4), (1000, 8), (5000, 16))  # below so many rows, so many a step
LARGEST_BATCH = 32
PRETRAIN_TOKENS = 16384  # a step
ROW_PASSES = 1200
"""Rows that are learned from in all, repeats counted, by a small set."""
FEWEST_EPOCHS, MOST_EPOCHS = ((5000, 3), (50_000, 2)), 20
SHORT_ANSWER = 30
"""Tokens of an answer up to which rows are taken for facts; longer ones teach a manner too, in fewer passes."""
FULL_SHARE = 0.6
"""Of the epochs of adapters, those that full weights need for the same."""
PATIENCE = 2


@dataclass(frozen=True)
class Habits:
    """How an objective departs from what holds for sft."""

    rate: float = 1.0
    """Share of sft's learning rate."""
    short_runs: bool = True
    """Few rows bear a higher rate."""
    step_tokens: int | None = None
    """Tokens that a step is made of, where it is not made of rows."""
    once: str = ""
    """Why the data is passed over once, where it is."""
    repeats: bool = True
    """Small sets are passed over many times."""
    dropout: bool = True
    """Adapters have dropout on small sets."""


HABITS: Mapping[ObjectiveName, Habits] = MappingProxyType(
    {
        "sft": Habits(),
        "pretrain": Habits(rate=0.5, short_runs=False, step_tokens=PRETRAIN_TOKENS, once="one pass over plain text"),
        # Lambert et al. 2024, Tülu 3 (arXiv:2411.15124): 5e-6 for sft and 5e-7 for dpo of the same 8B model. Dropout would
        # make noise of what is measured against the base model.
        "dpo": Habits(rate=0.1, repeats=False, dropout=False),
        # Beside the preference it learns the chosen answers as sft does.
        "orpo": Habits(),
    }
)


@dataclass(frozen=True)
class Choice:
    """A conf without `auto`, and why each of the chosen keys is what it is."""

    conf: FinetuneConf
    reasons: dict[str, str]

    def lines(self) -> list[str]:
        """The chosen values for people, a line each."""
        values = flat(self.conf.model_dump(include={"training", "tuning"}))
        return [f"{key} {_number(values[key])}: {reason}" for key, reason in self.reasons.items()]


def choose(conf: FinetuneConf, data: DataStats, width: int, experts: bool = False) -> Choice:
    """The conf with every `auto` of `training` and `tuning` replaced, but epochs where `max_steps` rules. `width`: the
    model's hidden size; `experts`: whether it is a mixture of experts."""
    training, rows = conf.training, data.train.sequences
    chosen: dict[str, object] = {}
    reasons: dict[str, str] = {}
    batch = training.global_batch_size
    if batch == "auto":
        batch = batch_for(data, HABITS[conf.tuning.objective])
        chosen["global_batch_size"] = batch
        reasons["training.global_batch_size"] = f"for {rows} rows of {data.train.mean:.0f} tokens"
    if training.learning_rate == "auto":
        chosen["learning_rate"] = rate_for(conf, width, rows)
        less = f", objective {conf.tuning.objective}" if HABITS[conf.tuning.objective].rate != 1 else ""
        reasons["training.learning_rate"] = (
            f"for method {conf.tuning.method}{less}, {rows} rows, and a model {width} wide"
        )
    epochs = training.epochs
    if epochs == "auto" and not training.max_steps:
        chosen["epochs"], reasons["training.epochs"] = epochs_for(conf, data, math.ceil(rows / batch))
    if training.early_stopping == "auto":
        guarded = epochs == "auto" and not training.max_steps and data.validation is not None
        chosen["early_stopping"] = EarlyStopping(patience=PATIENCE) if guarded else None
    lora = conf.tuning.lora
    if lora.dropout == "auto":
        small = rows < DROPOUT_ROWS and not experts and HABITS[conf.tuning.objective].dropout
        lora = lora.model_copy(update={"dropout": DROPOUT if small else 0.0})
        if conf.tuning.method == "lora":
            also = "" if HABITS[conf.tuning.objective].dropout else f" and objective {conf.tuning.objective}"
            reasons["tuning.lora.dropout"] = f"for {rows} rows" + (" and a mixture of experts" if experts else also)
    update = {"training": training.model_copy(update=chosen), "tuning": conf.tuning.model_copy(update={"lora": lora})}
    return Choice(conf.model_copy(update=update), reasons)


def batch_for(data: DataStats, habits: Habits) -> int:
    """Rows a step: few for small sets, so that there are steps enough; or about as many as have `habits.step_tokens`
    tokens."""
    if habits.step_tokens:
        return max(1, min(data.train.sequences, round(habits.step_tokens * data.train.sequences / data.train.tokens)))
    rows = data.train.sequences
    return next((batch for limit, batch in BATCHES if rows < limit), LARGEST_BATCH)


def rate_for(conf: FinetuneConf, width: int, rows: int) -> float:
    """The highest learning rate for a model of this width on so many rows."""
    rate = FULL_RATE * (RATE_WIDTH / width) ** RATE_EXPONENT
    if conf.tuning.method == "lora":
        rate *= LORA_FACTOR
    habits = HABITS[conf.tuning.objective]
    rate *= habits.rate
    if rows < SMALL and habits.short_runs:
        rate *= SHORT_RUN_FACTOR
    return float(f"{rate:.2g}")


def epochs_for(conf: FinetuneConf, data: DataStats, steps_per_epoch: int) -> tuple[float, str]:
    """Passes over the data, and the reason."""
    rows = data.train.sequences
    if reason := HABITS[conf.tuning.objective].once:
        return 1.0, reason
    fewest = next((epochs for limit, epochs in FEWEST_EPOCHS if rows < limit), 1)
    if not HABITS[conf.tuning.objective].repeats:
        return float(
            fewest
        ), f"{rows} pairs make {steps_per_epoch} steps an epoch; more passes soon fit the pairs alone"
    epochs = min(MOST_EPOCHS, ROW_PASSES / rows) * min(1.0, math.sqrt(SHORT_ANSWER / max(1.0, data.train.answer)))
    if conf.tuning.method == "full":
        epochs *= FULL_SHARE
    guard = ", fewer if the validation loss stops falling" if data.validation else ""
    answers = f"{rows} rows with answers of {data.train.answer:.0f} tokens"
    return float(max(fewest, round(epochs))), f"{answers} make {steps_per_epoch} steps an epoch{guard}"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
