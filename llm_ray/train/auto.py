"""Chooses hyperparameters set to `auto` (epochs, batch size, learning rate, …) from data, method and model.

    choice = choose(conf, read_stats(run_dir / "prepared"), width=576)
    choice.conf.training.epochs, choice.reasons["training.epochs"]

The rules and the measurements behind them: docs/design/training.md, "What auto chooses".
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

RULES = 3
"""Version of the rules; increase it with every change, since the same conf then trains differently."""

# Schulman et al. 2025, "LoRA Without Regret": the best rate for full finetuning is about 5e-5 at width 2000 and falls
# with the width; for adapters it is 10 times as high, and 15 times in short runs.
FULL_RATE, RATE_WIDTH, RATE_EXPONENT = 5e-5, 2000, 0.78
LORA_FACTOR, SHORT_RUN_FACTOR = 10, 1.5
SMALL = 200
"""A data set with fewer rows is small: few steps, no validation."""
DROPOUT, DROPOUT_ROWS = 0.1, 500  # adapters use dropout below that number of rows
BATCHES = ((SMALL, 4), (1000, 8), (5000, 16))  # (data sets with fewer rows, rows per step)
LARGEST_BATCH = 32
PRETRAIN_TOKENS = 16384  # per step
ROW_PASSES = 1200
"""Rows times epochs of a small data set."""
FACT_EPOCHS, FACT_PASSES = 8, 8000
"""Epochs that facts need in larger data sets, too, and most rows times epochs for them."""
FACT_VIEWS = 24
"""How often an answer is seen as a fact: with more than three wordings of each question, in fewer epochs."""
FEWEST_EPOCHS, MOST_EPOCHS = ((5000, 3), (50_000, 2)), 20
SHORT_ANSWER = 30
"""Mean answer length, in tokens, up to which rows count as facts; longer answers also teach style, in fewer epochs."""
FULL_SHARE = 0.6
"""Epochs of full finetuning, as a fraction of those that adapters need for the same result."""
PATIENCE = 2


@dataclass(frozen=True)
class Habits:
    """How the rules for an objective differ from those for sft."""

    rate: float = 1.0
    """Learning rate relative to sft's."""
    short_runs: bool = True
    """Whether small data sets get a higher learning rate."""
    step_tokens: int | None = None
    """Tokens per step, if batches are measured in tokens instead of rows."""
    once: str = ""
    """Why there is only one epoch; empty if there may be more."""
    repeats: bool = True
    """Whether small data sets get many epochs."""
    dropout: bool = True
    """Whether adapters use dropout on small data sets."""
    fewest_rows: int = 1
    """Fewest rows per step."""


HABITS: Mapping[ObjectiveName, Habits] = MappingProxyType(
    {
        "sft": Habits(),
        "pretrain": Habits(rate=0.5, short_runs=False, step_tokens=PRETRAIN_TOKENS, once="one pass over plain text"),
        # Lambert et al. 2024, Tülu 3 (arXiv:2411.15124): 5e-6 for sft and 5e-7 for dpo of the same 8B model. Dropout
        # would add noise to the comparison with the base model.
        "dpo": Habits(rate=0.1, repeats=False, dropout=False),
        # Its loss contains that of sft on the chosen answers.
        "orpo": Habits(),
        # Ethayarajh et al. 2024 (arXiv:2402.01306): 2 to 10 times the rate of dpo, and steps of at least 8 rows, on which
        # the divergence from the base model is estimated.
        "kto": Habits(rate=0.2, repeats=False, dropout=False, fewest_rows=8),
    }
)


@dataclass(frozen=True)
class Choice:
    """A conf without `auto`, and the reason for each chosen value, by key."""

    conf: FinetuneConf
    reasons: dict[str, str]

    def lines(self) -> list[str]:
        """Returns the chosen values with their reasons for the user, a line each."""
        values = flat(self.conf.model_dump(include={"training", "tuning"}))
        return [f"{key} {_number(values[key])}: {reason}" for key, reason in self.reasons.items()]


def choose(conf: FinetuneConf, data: DataStats, width: int, experts: bool = False) -> Choice:
    """Replaces every `auto` of `training` and `tuning`, except epochs if `max_steps` is set. `width`: the model's hidden
    size; `experts`: whether it is a mixture of experts."""
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
    """Returns the rows per step: few for small data sets, so that there are enough steps; with `habits.step_tokens`, as
    many as have about so many tokens."""
    if habits.step_tokens:
        return max(1, min(data.train.sequences, round(habits.step_tokens * data.train.sequences / data.train.tokens)))
    rows = data.train.sequences
    return max(habits.fewest_rows, next((batch for limit, batch in BATCHES if rows < limit), LARGEST_BATCH))


def rate_for(conf: FinetuneConf, width: int, rows: int) -> float:
    """Returns the peak learning rate for a model of this width and this number of rows."""
    rate = FULL_RATE * (RATE_WIDTH / width) ** RATE_EXPONENT
    if conf.tuning.method == "lora":
        rate *= LORA_FACTOR
    habits = HABITS[conf.tuning.objective]
    rate *= habits.rate
    if rows < SMALL and habits.short_runs:
        rate *= SHORT_RUN_FACTOR
    return float(f"{rate:.2g}")


def epochs_for(conf: FinetuneConf, data: DataStats, steps_per_epoch: int) -> tuple[float, str]:
    """Returns the number of epochs, and the reason."""
    rows = data.train.sequences
    if reason := HABITS[conf.tuning.objective].once:
        return 1.0, reason
    fewest = next((epochs for limit, epochs in FEWEST_EPOCHS if rows < limit), 1)
    if not HABITS[conf.tuning.objective].repeats:
        what = "pairs" if conf.objective.reads == "pairs" else "answers"
        return float(fewest), f"{rows} {what} make {steps_per_epoch} steps an epoch; more epochs soon overfit"
    short = min(1.0, SHORT_ANSWER / max(1.0, data.train.answer))
    facts = min(FACT_EPOCHS, FACT_PASSES / rows, FACT_VIEWS * data.answers / rows)
    epochs = max(min(MOST_EPOCHS, ROW_PASSES / rows) * math.sqrt(short), facts * short)
    if conf.tuning.method == "full":
        epochs *= FULL_SHARE
    guard = ", fewer if the validation loss stops falling" if data.validation else ""
    answers = f"{rows} rows with {data.answers} different answers of {data.train.answer:.0f} tokens"
    return float(max(fewest, round(epochs))), f"{answers} make {steps_per_epoch} steps an epoch{guard}"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
