"""The keys of a finetune conf, read off its JSON Schema: what each may hold, and which one a misspelled key was meant to be.

The messages of ``llm_ray.conf.load`` and the tables of ``llm_ray.conf.reference`` both come from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from llm_ray.conf.schema import FinetuneConf

# What other tools call these keys (Hugging Face Trainer and TRL, peft, torchtune, axolotl, LLaMA-Factory, llm-on-ray).
ELSEWHERE = {
    "adapter": "tuning.method",
    "base_model": "model.base",
    "bf16": "training.precision",
    "chat_template_jinja": "model.chat_template",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "eval_steps": "training.validate_every",
    "finetuning_type": "tuning.method",
    "fp16": "training.precision",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "logging_steps": "tracking.log_every",
    "lora_alpha": "tuning.lora.alpha",
    "lora_config": "tuning.lora",
    "lora_dropout": "tuning.lora.dropout",
    "lora_r": "tuning.lora.r",
    "lora_rank": "tuning.lora.r",
    "lora_target": "tuning.lora.target_modules",
    "lora_target_modules": "tuning.lora.target_modules",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "max_seq_length": "data.max_length",
    "max_train_steps": "training.max_steps",
    "micro_batch_size": "training.batch_size",
    "model_name_or_path": "model.base",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "num_training_workers": "runtime.workers",
    "num_workers": "runtime.workers",
    "optim": "training.optimizer",
    "output_dir": "paths.runs",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "rank": "tuning.lora.r",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "scheduler": "training.schedule",
    "sequence_len": "data.max_length",
    "template": "model.chat_template",
    "train_file": "data.train",
    "val_set_size": "data.validation",
    "validation_file": "data.validation",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
}


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, the JSON Schema of its value, and, where it is a section, the name of the section's definition."""

    name: str
    schema: dict[str, Any]
    required: bool
    section: str | None

    @property
    def free(self) -> bool:
        """Whether the keys below it are the user's own, as in ``data.columns``."""
        return bool(self.schema.get("additionalProperties")) and self.section is None

    @property
    def text(self) -> str:
        """Its documentation."""
        return " ".join(str(self.schema.get("description", "")).split())


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a finetune conf."""
    return FinetuneConf.model_json_schema()


@cache
def table() -> dict[str, Key]:
    """Every key by its dotted name, in the order of the schema, sections before what they hold."""
    return {key.name: key for key in _walk(schema(), "")}


def _walk(node: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, value in node["properties"].items():
        references = [option["$ref"] for option in [value, *value.get("anyOf", ())] if "$ref" in option]
        section = references[0].rsplit("/", 1)[1] if references else None
        yield Key(prefix + name, value, name in node.get("required", ()), section)
        if section:
            yield from _walk(schema()["$defs"][section], f"{prefix}{name}.")


def known(name: str) -> bool:
    """Whether `name` (dotted) is a key of the conf, or lies below one whose keys are the user's own."""
    parents = (name[:i] for i, character in enumerate(name) if character == ".")
    return name in table() or any(parent in table() and table()[parent].free for parent in parents)


def nearest(name: str) -> str | None:
    """The key that an unknown dotted `name` was probably meant to be; ``None`` if there is no likeness."""
    section, _, leaf = name.rpartition(".")
    leaf = leaf.lower().replace("-", "_")
    beside = {key.rpartition(".")[2]: key for key in table() if key.rpartition(".")[0] == section}
    same = [key for key in table() if key.rpartition(".")[2] == leaf]
    if close := get_close_matches(leaf, beside, 1, 0.8):
        return beside[close[0]]
    if same or leaf in ELSEWHERE:
        return (same or [ELSEWHERE[leaf]])[0]
    if close := get_close_matches(leaf, beside, 1, 0.6):
        return beside[close[0]]
    everywhere = ELSEWHERE | {name.rpartition(".")[2]: name for name, key in table().items() if not key.section}
    close = get_close_matches(leaf, everywhere, 1, 0.75)
    return everywhere[close[0]] if close else None


def choices(node: dict[str, Any]) -> list[str]:
    """The words that a value may be, of all its alternatives and list items."""
    words = [str(word) for word in node.get("enum", ())] + ([str(node["const"])] if "const" in node else [])
    for option in [*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())]:
        words += choices(option)
    return words


def describe(node: dict[str, Any], mark: str = "") -> str:
    """What a value may be, in words: ``a whole number of at least 1 or auto``. Literal words are put between `mark`."""

    def word(value: object) -> str:
        return f"{mark}{'null' if value is None else value}{mark}"

    if "anyOf" in node:
        words = [describe(option, mark) for option in node["anyOf"]]
        return _or([f"{word}, or a list of these" for word in words[:1] if f"a list of {word}" in words[1:]] or words)
    if "enum" in node or "const" in node:
        return _or([word(value) for value in node.get("enum", [node.get("const")])])
    if "$ref" in node:
        return "a section"
    kind = node.get("type")
    if kind == "null":
        return word(None)
    if kind in ("integer", "number"):
        limits = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
        bounds = " and ".join(f"{text} {node[limit]:g}" for limit, text in limits.items() if limit in node)
        return " ".join(["a whole number" if kind == "integer" else "a number", *([bounds] if bounds else [])])
    if kind == "array":
        items = node.get("items") or node["prefixItems"][0]
        count = f"{node['maxItems']} " if "maxItems" in node else ""
        if node.get("minItems") and not count:
            count = "one or more "
        if choices(items):
            return f"a list of {describe(items, mark)}"
        return f"a list of {count}{'numbers' if items.get('type') == 'number' else 'texts'}"
    return {"string": "a path" if node.get("format") == "path" else "text", "boolean": f"{word('true')} or {word('false')}"}.get(
        str(kind), "keys with values"
    )


def first_sentence(text: str) -> str:
    """The text up to its first full stop, that included."""
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def _or(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" or {parts[-1]}"
