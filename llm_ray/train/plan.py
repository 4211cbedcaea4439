"""What a training is going to do, in words and for params.json: precision and why, threads, strategy, steps."""

from __future__ import annotations

from typing import Any

from llm_ray.conf.schema import FinetuneConf
from llm_ray.data.prepare import open_split
from llm_ray.hardware import choose_precision, cpu_flags
from llm_ray.train.batches import plan_steps


def describe_plan(conf: FinetuneConf, cpus: int) -> tuple[dict[str, Any], list[str]]:
    """Parameters as run (the conf's, with what `auto` came to on this host), and lines for people."""
    training, workers = conf.training, conf.runtime.workers
    precision, reason = choose_precision(training.precision, cpu_flags())
    schedule, steps = plan_steps(conf, len(open_split(conf.run_dir / "prepared", "train")))
    params = {
        "base": conf.model.base,
        "objective": conf.tuning.objective,
        "method": conf.tuning.method,
        **({"lora": conf.tuning.lora.model_dump(mode="json") | {"alpha": conf.tuning.lora.scale}} if conf.tuning.method == "lora" else {}),
        **training.model_dump(mode="json", exclude_none=True),
        "learning_rate": conf.learning_rate,
        "epochs": steps / schedule.steps_per_epoch,
        "max_steps": steps,
        "precision": precision,
        "precision_reason": reason,
        "workers": workers,
        "cpus_per_worker": cpus,
        "sequences_per_step": schedule.per_step,
        "max_length": conf.data.max_length,
        "packing": conf.data.packing,
    }
    lines = [
        f"precision {precision}: {reason}",
        f"{workers} worker(s) with {cpus} CPU(s) each, {training.strategy if workers > 1 else 'alone'}; {schedule.per_step} sequences a step",
        f"{steps} steps ({steps / schedule.steps_per_epoch:.3g} epochs of {schedule.steps_per_epoch})",
    ]
    return params, lines
