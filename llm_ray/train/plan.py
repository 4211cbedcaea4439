"""The plan of a training, as text and for params.json: hyperparameters, precision with its reason, CPUs, strategy and
steps; and warnings about it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_ray.conf.finetune import EarlyStopping, FinetuneConf
from llm_ray.conf.section import as_run
from llm_ray.data.formats import Conversation
from llm_ray.data.prepare import DataStats, asked_in_training, cut_off, lengths_of, open_split
from llm_ray.hardware import choose_precision, cpu_flags
from llm_ray.train.auto import Choice, rate_for
from llm_ray.train.batches import plan_steps

FEW_STEPS = 20
"""Fewer optimizer steps than these hardly change a model."""
HIGH_RATE, LOW_RATE = 8, 30
"""Factors above and below the usual learning rate beyond which a warning is given."""
MOST_UNBALANCED = 2
"""How many times the weighted good answers may outnumber the bad ones, or the reverse, without a warning."""
IDEAL_BALANCE = 1.15
"""Ratio of weighted good answers to bad ones that is advised (arXiv:2402.01306, eq. 8: between 1 and 4/3)."""
FEW_VALIDATION_ROWS = 10
"""The loss over fewer validation rows means little."""


def describe_plan(choice: Choice, prepared: Path, cpus: int) -> tuple[dict[str, Any], list[str]]:
    """Returns the parameters as run (the conf's, with `auto` resolved on this host), and lines for the user."""
    conf = choice.conf
    training, workers = conf.training, conf.runtime.workers
    precision, reason = choose_precision(training.precision, cpu_flags())
    schedule, steps = plan_steps(conf, lengths_of(open_split(prepared, "train")))
    epochs = steps / schedule.steps_per_epoch
    params = {
        "base": conf.model.base,
        "objective": conf.tuning.objective,
        "method": conf.tuning.method,
        **(
            {
                "lora": conf.tuning.lora.model_dump(mode="json")
                | {"alpha": conf.tuning.lora.scale, "alpha_pattern": conf.tuning.lora.alphas}
            }
            if conf.tuning.method == "lora"
            else {}
        ),
        **conf.tuning.model_dump(mode="json", include={conf.objective.section} if conf.objective.section else set()),
        **training.model_dump(mode="json", exclude_none=True),
        "epochs": epochs,
        "max_steps": steps,
        "precision": precision,
        "precision_reason": reason,
        "workers": workers,
        "cpus_per_worker": cpus,
        "micro_batch_tokens": schedule.limit,
        "max_length": conf.data.max_length,
        "packing": conf.data.packing,
        "reasons": choice.reasons,
    }
    lines = [
        f"precision {precision}: {reason}",
        f"{workers} worker(s) with {cpus} CPU(s) each, {training.strategy if workers > 1 else 'alone'}",
        *choice.lines(),
        f"{steps} steps of {schedule.batch_size} rows ({epochs:.3g} epochs of {schedule.steps_per_epoch})",
    ]
    return params, lines


def warnings(
    conf: FinetuneConf,
    data: DataStats,
    steps: int,
    width: int,
    asked: Iterable[Conversation] = (),
    prepared: Path | None = None,
) -> list[str]:
    """Returns warnings about a plan, each with advice. `conf` must not contain `auto`; `asked`: the questions of
    evaluation.data, looked up among the training rows in `prepared`."""
    training, found = conf.training, []
    if steps < FEW_STEPS:
        found.append(
            f"{_count(steps, 'optimizer step')} will hardly change a model: raise training.epochs or "
            f"training.max_steps, or lower training.global_batch_size ({training.global_batch_size})"
        )
    rate, usual = as_run(training.learning_rate), rate_for(conf, width, data.train.sequences)
    if rate > HIGH_RATE * usual:
        found.append(
            f"training.learning_rate {rate:g} is {rate / usual:.0f} times the usual rate of method "
            f"{conf.tuning.method} for a model of this width ({usual:g}): the loss may rise or become nan; lower it, "
            "or set it to auto"
        )
    if rate < usual / LOW_RATE:
        found.append(
            f"training.learning_rate {rate:g} is a {usual / rate:.0f}th of the usual rate of method "
            f"{conf.tuning.method} for a model of this width ({usual:g}): little will be learned; raise it, or set "
            "it to auto"
        )
    cut = data.truncated + cut_off(data.dropped)
    if cut * 2 > data.read:
        found.append(f"answers of {cut} of {data.read} rows are cut off by data.max_length {data.max_length}: raise it")
    guards = training.best_checkpoint or isinstance(training.early_stopping, EarlyStopping)
    if data.validation and data.validation.rows < FEW_VALIDATION_ROWS and guards:
        found.append(
            f"a validation split of {_count(data.validation.rows, 'row')} is too small to be meaningful, but decides "
            "which weights are exported: give data.validation more rows, or set it to null to train on all rows"
        )
    rows = data.train.rows
    if data.repeated * 50 > rows:
        found.append(
            f"training rows that repeat another one: {data.repeated} of {rows}. They count twice: remove them "
            "(data.processor: deduplicate)"
        )
    if data.contradicting:
        found.append(
            {
                "pairs": "training pairs that prefer the answer that another pair rejects, out of the same two",
                "ratings": "training rows that rate the same answer differently than another one",
            }.get(conf.objective.reads, "training rows with the same question as another one, but a different answer")
            + f": {data.contradicting} of {rows}. The model cannot learn both: correct them (the first are listed "
            "with the data)"
        )
    if data.train.good is not None:
        found += _unbalanced(conf, data.train.good, data.train.sequences - data.train.good)
    if data.leaked and data.validation:
        found.append(
            f"validation rows with the same question as a training row: {data.leaked} of {data.validation.rows}. "
            "Their loss says nothing about new questions: remove them from one of the two"
        )
    if prepared and (known := asked_in_training(prepared, asked)):
        found.append(
            f"questions of evaluation.data that are also in the training rows: {known}. Correct answers to them "
            "prove nothing: remove them"
        )
    return found


def _unbalanced(conf: FinetuneConf, good: int, bad: int) -> list[str]:
    """Returns a warning if answers of one rating are missing, or weigh much more than those of the other."""
    if not good or not bad:
        return [
            f"all {_count(good + bad, 'training answer')} are rated {'good' if good else 'bad'}: objective "
            f"{conf.tuning.objective} learns from the difference between good and bad ones; add rows with label "
            f"{'false' if good else 'true'}" + (", or use objective sft" if good else "")
        ]
    kto = conf.tuning.kto
    desirable, undesirable = kto.desirable_weight * good, kto.undesirable_weight * bad
    if not desirable or not undesirable or 1 / MOST_UNBALANCED <= desirable / undesirable <= MOST_UNBALANCED:
        return []
    if good < bad:
        advice = f"tuning.kto.desirable_weight {IDEAL_BALANCE * undesirable / good:.2g}"
    else:
        advice = f"tuning.kto.undesirable_weight {desirable / IDEAL_BALANCE / bad:.2g}"
    return [
        f"{good} training answers are rated good and {bad} bad: with the weights of tuning.kto their ratio is "
        f"{desirable / undesirable:.2g}, and should be between 1 and 4/3; set {advice}"
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
