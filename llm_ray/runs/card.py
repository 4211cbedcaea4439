"""The model card (README.md) of a finetuned model: what was trained on what, how well it does, and how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llm_ray.conf.finetune import FinetuneConf, Tuning
from llm_ray.conf.section import as_run
from llm_ray.models.load import Base
from llm_ray.models.registry import licence
from llm_ray.runs.benchmarks import label, shown, whole

FIGURES = {
    "validation_loss": "validation loss",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "reward_accuracy": "held-out pairs of which the chosen answer is preferred",
    "rating_accuracy": "held-out answers whose reward agrees with their rating",
    "reward_margin": "margin of rewards",
}
"""What figures of an evaluation are called, in cards and reports."""


def model_card(conf: FinetuneConf, base: Base, run_json: dict[str, Any], result: dict[str, Any]) -> str:
    """Returns the model card as Markdown with Hugging Face's YAML header, from a run's conf, run.json and result.json.

    Data files are named without their folders, since a card may be published. Sections without figures (no evaluation)
    are omitted.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    known = base.location.folder or _cached(conf)
    base_licence = licence(known) if known else None
    header = {
        "base_model": base.location.name,  # without its folder, which is meaningless elsewhere
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "llm-ray",
            conf.tuning.objective,
            conf.tuning.method,
            *(["conversational"] if conf.objective.answers else []),
        ],
        **({"license": base_licence} if base_licence else {}),
    }
    environment = Environment(  # Markdown, not HTML: nothing to escape
        loader=PackageLoader("llm_ray.runs", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.4g}"
    environment.filters["label"], environment.globals["shown"] = label, shown
    return environment.get_template("card.md.j2").render(
        conf=conf,
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        base=base.location.name,
        licence=base_licence,
        data=result.get("data", {}),
        training=result.get("training", {}),
        evaluation=result.get("evaluation", {}),
        figures=FIGURES,
        benchmarks=whole(result.get("evaluation", {}).get("tasks", [])),
        files=[_file(entry) for entry in run_json.get("data", {}).get("train", [])],
        hyperparameters=_hyperparameters(conf),
        lineage=run_json,
    )


def _cached(conf: FinetuneConf) -> Path | None:
    """Returns the folder of a hub model in the local cache; None if it was not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(conf.model.base, "README.md", revision=conf.model.revision)
    return Path(card).parent if isinstance(card, str) else None


def _file(entry: dict[str, Any]) -> str:
    if "hub" in entry:
        return f"[{entry['hub']}](https://huggingface.co/datasets/{entry['hub']})"
    return f"`{Path(entry['path']).name}` ({entry['bytes']} bytes, sha256 `{entry['sha256'][:16]}`)"


def _hyperparameters(conf: FinetuneConf) -> dict[str, object]:
    training, lora = conf.training, conf.tuning.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    variants = [name for name, used in (("rsLoRA", lora.rslora), ("DoRA", lora.dora)) if used]
    if lora.loraplus_lr_ratio != 1:
        variants.append(f"LoRA+ with {lora.loraplus_lr_ratio:g} times the learning rate for B")
    adapter: dict[str, object] = {
        "LoRA rank": lora.r,
        "LoRA alpha": lora.scale,
        "LoRA dropout": lora.dropped,
        "LoRA targets": targets,
        **({"LoRA ranks of some layers": _listed(lora.rank_pattern)} if lora.rank_pattern else {}),
        **({"LoRA alphas of some layers": _listed(lora.alphas)} if lora.alphas else {}),
        **({"LoRA variants": ", ".join(variants)} if variants else {}),
    }
    return {
        "objective": conf.tuning.objective,
        "method": conf.tuning.method,
        **({"base's linear layers in training": conf.model.weights} if conf.model.weights else {}),
        **(adapter if conf.tuning.method == "lora" else {}),
        **_preference(conf.tuning),
        **({"steps": training.max_steps} if training.max_steps else {"epochs": f"{as_run(training.epochs):g}"}),
        "rows per step": as_run(training.global_batch_size),
        "longest sequence": f"{conf.data.max_length} tokens",
        "learning rate": f"{as_run(training.learning_rate):g}, {training.schedule}, warm-up {training.warmup:g}",
        "optimizer": f"{training.optimizer}, betas {training.betas[0]:g} and {training.betas[1]:g}, weight decay "
        f"{training.weight_decay:g}",
        "gradient clipping": training.max_grad_norm or "none",
        "precision": training.precision,
        "strategy": f"{training.strategy}, {conf.runtime.workers} worker(s)",
        "seed": training.seed,
    }


def _listed(pattern: dict[str, int]) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in pattern.items())


def _preference(tuning: Tuning) -> dict[str, object]:
    dpo = tuning.dpo
    if tuning.objective == "orpo":
        return {"beta": f"{tuning.orpo.beta:g}"}
    if tuning.objective == "kto":
        return {
            "preference loss": tuning.kto.loss,
            "beta": f"{tuning.kto.beta:g}",
            "weights of good and bad answers": f"{tuning.kto.desirable_weight:g} and {tuning.kto.undesirable_weight:g}",
        }
    if tuning.objective != "dpo":
        return {}
    return {
        "preference loss": dpo.loss,
        "beta": f"{dpo.beta:g}",
        **({"label smoothing": f"{dpo.label_smoothing:g}"} if dpo.label_smoothing else {}),
        **({"weight of the sft term": f"{dpo.sft_weight:g}"} if dpo.sft_weight else {}),
    }
