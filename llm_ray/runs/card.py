"""The model card (README.md) of a finetuned model: what was trained on what, how well it does, and how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llm_ray.conf import yamltext
from llm_ray.conf.schema import FinetuneConf
from llm_ray.models.load import resolve

FIGURES = {"validation_loss": "validation loss", "perplexity": "perplexity", "exact_match": "exact match", "token_f1": "token F1"}


def model_card(conf: FinetuneConf, run_json: dict[str, Any], result: dict[str, Any]) -> str:
    """The card as Markdown with Hugging Face's YAML header, from a run's conf, run.json and result.json.

    Data files are named without their folders: a card is published. Sections without figures (no evaluation) are left out.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = resolve(conf.model.base, conf.paths).folder
    licence = _licence(conf, folder)
    header = {
        # The hub takes ids of its own for base_model; a folder of this machine means nothing there.
        "base_model": conf.model.base if folder is None else folder.name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llm-ray", conf.tuning.objective, conf.tuning.method, *(["conversational"] if conf.tuning.objective == "sft" else [])],
        **({"license": licence} if licence else {}),
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
    return environment.get_template("card.md.j2").render(
        conf=conf,
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        base=header["base_model"],
        licence=licence,
        data=result.get("data", {}),
        training=result.get("training", {}),
        evaluation=result.get("evaluation", {}),
        figures=FIGURES,
        files=[_file(entry) for entry in run_json.get("data", {}).get("train", [])],
        hyperparameters=_hyperparameters(conf),
        lineage=run_json,
    )


def _licence(conf: FinetuneConf, folder: Path | None) -> str | None:
    """The licence that the base model's own card names; None where there is no card or no licence in it."""
    card = folder / "README.md" if folder else _cached_card(conf)
    if not card or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        header = yamltext.parse(parts[1]).data if len(parts) == 3 and not parts[0].strip() else {}
    except yamltext.Problem:
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None


def _cached_card(conf: FinetuneConf) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(conf.model.base, "README.md", revision=conf.model.revision)
    return Path(found) if isinstance(found, str) else None


def _file(entry: dict[str, Any]) -> str:
    if "hub" in entry:
        return f"[{entry['hub']}](https://huggingface.co/datasets/{entry['hub']})"
    return f"`{Path(entry['path']).name}` ({entry['bytes']} bytes, sha256 `{entry['sha256'][:16]}`)"


def _hyperparameters(conf: FinetuneConf) -> dict[str, object]:
    training, lora = conf.training, conf.tuning.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    adapter = {"LoRA rank": lora.r, "LoRA alpha": lora.alpha or 2 * lora.r, "LoRA dropout": lora.dropout, "LoRA targets": targets}
    return {
        "objective": conf.tuning.objective,
        "method": conf.tuning.method,
        **(adapter if conf.tuning.method == "lora" else {}),
        **({"steps": training.max_steps} if training.max_steps else {"epochs": f"{conf.epochs:g}"}),
        "sequences per step": training.batch_size * training.gradient_accumulation * conf.runtime.workers,
        "longest sequence": f"{conf.data.max_length} tokens{', packed' if conf.data.packing else ''}",
        "learning rate": f"{conf.learning_rate:g}, {training.schedule}, warm-up {training.warmup:g}",
        "optimizer": f"{training.optimizer}, betas {training.betas[0]:g} and {training.betas[1]:g}, weight decay {training.weight_decay:g}",
        "gradient clipping": training.max_grad_norm or "none",
        "precision": training.precision,
        "strategy": f"{training.strategy}, {conf.runtime.workers} worker(s)",
        "seed": training.seed,
    }
