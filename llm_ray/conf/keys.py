"""The keys of a conf, from its JSON Schema, with their allowed values and suggestions for misspelled keys.

Used by the messages of ``llm_ray.conf.validate`` and the tables of ``llm_ray.conf.reference``. In a key's name, NAME
stands for a name chosen by the user: ``models.NAME.engine``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any, Generic, TypeVar

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import Section
from llm_ray.conf.serve import ServeConf
from llm_ray.conf.sweep import SweepConf
from llm_ray.conf.yamltext import Path
from llm_ray.nearest import nearest_names

C = TypeVar("C", bound=Section)


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, the JSON Schema of its value, and for a section the name of its definition."""

    name: str
    schema: dict[str, Any]
    required: bool
    section: str | None

    @property
    def above(self) -> str:
        """Name of its section; empty for top-level keys."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def free(self) -> dict[str, Any] | bool:
        """The schema of values below it if their names are chosen by the user, as in ``data.columns``; else
        ``False``."""
        values: dict[str, Any] | bool = self.schema.get("additionalProperties", False)
        return False if self.section or (isinstance(values, dict) and "$ref" in values) else values

    @property
    def is_path(self) -> bool:
        """Whether its value is the path of a file or folder."""
        return any(option.get("format") == "path" for option in [self.schema, *self.schema.get("anyOf", ())])

    @property
    def text(self) -> str:
        """Its documentation."""
        return " ".join(str(self.schema.get("description", "")).split())


class Keys(Generic[C]):
    """The keys of one kind of conf."""

    def __init__(self, kind: str, model: type[C], elsewhere: dict[str, str]) -> None:
        """`kind` is the command that reads the conf; `elsewhere` maps other tools' names for keys to ours."""
        self.kind = kind
        self.model = model
        self.elsewhere = elsewhere

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the conf."""
        return self.model.model_json_schema()

    @cached_property
    def table(self) -> dict[str, Key]:
        """All keys by dotted name, in the order of the schema; sections precede their keys."""
        return {key.name: key for key in self._walk(self.schema, "")}

    def _walk(self, node: dict[str, Any], prefix: str) -> Iterator[Key]:
        for name, value in node["properties"].items():
            yield from self._key(prefix + name, value, name in node.get("required", ()))

    def _key(self, name: str, value: dict[str, Any], required: bool) -> Iterator[Key]:
        references = [option["$ref"] for option in [value, *value.get("anyOf", ())] if "$ref" in option]
        section = references[0].rsplit("/", 1)[1] if references else None
        yield Key(name, value, required, section)
        if section:
            yield from self._walk(self.schema["$defs"][section], f"{name}.")
        elif isinstance(values := value.get("additionalProperties"), dict) and "$ref" in values:
            yield from self._key(f"{name}.NAME", values, required)

    def needed(self, name: str = "") -> list[Key]:
        """Returns the required keys at or below `name`; by default of the whole conf."""
        required = {key.name: key for key in self.table.values() if key.required}
        leaves = [key for key in required.values() if not key.section and not self.below(key.name)]
        return [
            key
            for key in leaves
            if key.name == name
            or (f"{key.above}.".startswith(f"{name}." if name else "") and key.above in {*required, "", name})
        ]

    def below(self, name: str) -> list[Key]:
        """Returns the keys of the section `name`; by default the top-level ones."""
        return [key for key in self.table.values() if key.above == name]

    def key(self, path: Path) -> Key | None:
        """Returns the key at `path` of a conf; ``None`` if the schema has none there."""
        name = ""
        for part in path:
            exact = f"{name}.{part}" if name else str(part)
            name = exact if exact in self.table and "." not in str(part) else f"{name}.NAME"
            if name not in self.table:
                return None
        return self.table.get(name)

    def known(self, path: Path) -> bool:
        """Returns whether `path` is a key of the conf, or below one whose keys are chosen by the user."""
        return self.key(path) is not None or any(key.free for i in range(len(path)) if (key := self.key(path[:i])))

    def named(self, path: Path) -> bool:
        """Returns whether `path` is a section named by the user, such as ``models.NAME``, or inside one."""
        return len(path) > 1 and f"{path[0]}.NAME" in self.table

    def paths(self, name: str, section: bool = False) -> list[Path]:
        """Returns the paths that a dotted name may refer to, several since a model's name may contain dots. `section`
        tells whether its value is a section."""
        ways = self._ways(name)
        return [way for way in (ways if section or len(ways) == 1 else ways[:-1]) if self.known(way)]

    def _ways(self, name: str) -> list[Path]:
        """Returns the possible readings of a dotted name, those with the shortest model names first; in the last one,
        all of it is the model's name."""
        first, *parts = name.split(".")
        if not self.named((first, *parts)):
            return [self._joined((first, *parts))]
        return [self._joined((first, ".".join(parts[:i]), *parts[i:])) for i in range(1, len(parts) + 1)]

    def _joined(self, path: Path) -> Path:
        """Returns the path with everything below a key like ``data.columns`` joined into one name."""
        for i in range(1, len(path)):
            if (key := self.key(path[:i])) and isinstance(key.free, dict):
                return (*path[:i], ".".join(map(str, path[i:])))
        return path

    def nearest(self, path: Path) -> str | None:
        """Returns the key that was probably meant by an unknown one at `path`; ``None`` if none is similar."""
        name = self._nearest(path)
        parts = name.split(".") if name else []
        above = [i for i, part in enumerate(parts) if part == "NAME" and [*path[:i]] == parts[:i] and len(path) > i + 1]
        return ".".join(str(path[i]) if i in above else part for i, part in enumerate(parts)) or None

    def _nearest(self, path: Path) -> str | None:
        section = self.key(path[:-1])
        leaf = str(path[-1]).lower().replace("-", "_")
        beside = (
            {key.leaf: key.name for key in self.below(section.name if section else "")}
            if section or len(path) == 1
            else {}
        )
        same = [key.name for key in self.table.values() if key.leaf == leaf]
        if same or leaf in self.elsewhere:
            return (same or [self.elsewhere[leaf]])[0]
        if close := nearest_names(leaf, beside):
            return beside[close[0]]
        everywhere = self.elsewhere | {key.leaf: key.name for key in self.table.values() if not key.section}
        close = nearest_names(leaf, everywhere)
        return everywhere[close[0]] if close else None

    def nearest_to(self, name: str) -> str | None:
        """Same as `nearest`, for a dotted name."""
        near = [found for way in self._ways(name) if (found := self.nearest(way))]
        return max(near, key=lambda found: SequenceMatcher(None, found, name).ratio(), default=None)


def choices(node: dict[str, Any]) -> list[str]:
    """Returns the literal words that a value may be, over all its alternatives and list items."""
    words = [str(word) for word in node.get("enum", ())] + ([str(node["const"])] if "const" in node else [])
    for option in [*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())]:
        words += choices(option)
    return words


def describe(node: dict[str, Any], mark: str = "") -> str:
    """Describes the allowed values in words: ``an integer of at least 1 or auto``. Literal words are enclosed in
    `mark`."""

    def word(value: object) -> str:
        return f"{mark}{'null' if value is None else value}{mark}"

    if "anyOf" in node:
        first, *others = (describe(option, mark) for option in node["anyOf"])
        if f"a list of {first}" in others:
            return f"{first}, or a list of them"
        return _or(
            [
                text
                for option in node["anyOf"]
                for text in ([*map(word, option.get("enum", ()))] or [describe(option, mark)])
            ]
        )
    if "enum" in node or "const" in node:
        return _or([word(value) for value in node.get("enum", [node.get("const")])])
    if "$ref" in node:
        return "a section"
    kind = node.get("type")
    if kind == "null":
        return word(None)
    if kind in ("integer", "number"):
        limits = {
            "minimum": "of at least",
            "exclusiveMinimum": "above",
            "maximum": "at most",
            "exclusiveMaximum": "below",
        }
        bounds = " and ".join(f"{text} {node[limit]:g}" for limit, text in limits.items() if limit in node)
        return " ".join(["an integer" if kind == "integer" else "a number", *([bounds] if bounds else [])])
    if kind == "array":
        items = node["prefixItems"][0] if "prefixItems" in node else node["items"]
        if not items:
            return "a list of values"
        count = f"{node['maxItems']} " if "maxItems" in node else ""
        if node.get("minItems") and not count:
            count = "one or more "
        if choices(items):
            return f"a list of {describe(items, mark)}"
        return f"a list of {count}{'numbers' if items.get('type') in ('number', 'integer') else 'texts'}"
    return {
        "string": "a path" if node.get("format") == "path" else "text",
        "boolean": f"{word('true')} or {word('false')}",
    }.get(str(kind), "keys with values")


def first_sentence(text: str) -> str:
    """Returns the text up to and including its first full stop."""
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def _or(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" or {parts[-1]}"


# Other names: of Hugging Face Trainer and TRL, peft, torchtune, axolotl, LLaMA-Factory, llm-on-ray.
FINETUNE = Keys(
    "finetune",
    FinetuneConf,
    {
        "adapter": "tuning.method",
        "base_model": "model.base",
        "bf16": "training.precision",
        "chat_template_jinja": "model.chat_template",
        "cutoff_len": "data.max_length",
        "dataset": "data.train",
        "dataset_name": "data.train",
        "desirable_weight": "tuning.kto.desirable_weight",
        "dpo_beta": "tuning.dpo.beta",
        "eval_steps": "training.validate_every",
        "finetuning_type": "tuning.method",
        "fp16": "training.precision",
        "gradient_accumulation_steps": "training.global_batch_size",
        "kto_chosen_weight": "tuning.kto.desirable_weight",
        "kto_desirable_weight": "tuning.kto.desirable_weight",
        "kto_rejected_weight": "tuning.kto.undesirable_weight",
        "kto_undesirable_weight": "tuning.kto.undesirable_weight",
        "logging_steps": "tracking.log_every",
        "lora_alpha": "tuning.lora.alpha",
        "lora_config": "tuning.lora",
        "lora_dropout": "tuning.lora.dropout",
        "lora_r": "tuning.lora.r",
        "lora_rank": "tuning.lora.r",
        "lora_target": "tuning.lora.target_modules",
        "lora_target_modules": "tuning.lora.target_modules",
        "loraplus_ratio": "tuning.lora.loraplus_lr_ratio",
        "loss_type": "tuning.dpo.loss",
        "lr": "training.learning_rate",
        "lr_scheduler": "training.schedule",
        "lr_scheduler_type": "training.schedule",
        "max_seq_length": "data.max_length",
        "max_train_steps": "training.max_steps",
        "micro_batch_size": "training.micro_batch_tokens",
        "model_name_or_path": "model.base",
        "num_epochs": "training.epochs",
        "num_train_epochs": "training.epochs",
        "num_training_workers": "runtime.workers",
        "num_workers": "runtime.workers",
        "optim": "training.optimizer",
        "output_dir": "paths.runs",
        "per_device_eval_batch_size": "evaluation.batch_size",
        "per_device_train_batch_size": "training.global_batch_size",
        "pref_beta": "tuning.dpo.beta",
        "pref_ftx": "tuning.dpo.sft_weight",
        "pref_loss": "tuning.dpo.loss",
        "rank": "tuning.lora.r",
        "save_steps": "checkpoint.every_steps",
        "save_total_limit": "checkpoint.keep",
        "scheduler": "training.schedule",
        "sequence_len": "data.max_length",
        "template": "model.chat_template",
        "train_file": "data.train",
        "undesirable_weight": "tuning.kto.undesirable_weight",
        "use_dora": "tuning.lora.dora",
        "use_rslora": "tuning.lora.rslora",
        "val_set_size": "data.validation",
        "validation_file": "data.validation",
        "warmup_ratio": "training.warmup",
        "warmup_steps": "training.warmup",
    },
)
# Other names: of vLLM, Ray Serve and ray.serve.llm, text-generation-inference, llm-on-ray.
SERVE = Keys(
    "serve",
    ServeConf,
    {
        "allowed_origins": "endpoint.cors_origins",
        "api_key": "endpoint.api_keys",
        "autoscaling": "models.NAME.autoscale",
        "autoscaling_config": "models.NAME.autoscale",
        "base": "models.NAME.model",
        "base_model_id_or_path": "models.NAME.model",
        "bf16": "models.NAME.precision",
        "chat_processor": "models.NAME.chat_template",
        "cpus_per_worker": "models.NAME.cpus",
        "downscale_delay_s": "models.NAME.autoscale.idle_s",
        "dtype": "models.NAME.precision",
        "enable_auto_tool_choice": "models.NAME.tools",
        "enable_lora": "models.NAME.adapters",
        "enable_prefix_caching": "models.NAME.engine_options.enable_prefix_caching",
        "enforce_eager": "models.NAME.compile",
        "engine_args": "models.NAME.engine_options",
        "engine_kwargs": "models.NAME.engine_options",
        "gpu_memory_utilization": "models.NAME.kv_cache_gib",
        "http_options": "endpoint",
        "ipex": "models.NAME.engine",
        "kv_cache_memory_bytes": "models.NAME.kv_cache_gib",
        "llm_configs": "models",
        "llm_engine": "models.NAME.engine",
        "lora_config": "models.NAME.adapters",
        "lora_modules": "models.NAME.adapters",
        "max_batch_size": "models.NAME.max_batch",
        "max_concurrent_queries": "models.NAME.max_batch",
        "max_concurrent_requests": "models.NAME.max_batch",
        "max_length": "models.NAME.max_model_len",
        "max_model_length": "models.NAME.max_model_len",
        "max_new_tokens": "endpoint.limits.max_tokens",
        "max_num_batched_tokens": "models.NAME.engine_options.max_num_batched_tokens",
        "max_num_seqs": "models.NAME.max_batch",
        "max_ongoing_requests": "models.NAME.max_batch",
        "max_queued_requests": "models.NAME.max_queue",
        "max_replicas": "models.NAME.autoscale.max",
        "max_seq_len": "models.NAME.max_model_len",
        "max_total_tokens": "models.NAME.max_model_len",
        "min_replicas": "models.NAME.autoscale.min",
        "model_description": "models.NAME.model",
        "model_id": "models",
        "model_id_or_path": "models.NAME.model",
        "model_loading_config": "models.NAME.model",
        "model_name": "models",
        "model_name_or_path": "models.NAME.model",
        "model_source": "models.NAME.model",
        "name": "models",
        "num_cpus": "models.NAME.cpus",
        "num_cpus_per_worker": "models.NAME.cpus",
        "num_replicas": "models.NAME.replicas",
        "peft_model_id_or_path": "models.NAME.adapters",
        "pipeline_parallel_size": "models.NAME.engine_options.pipeline_parallel_size",
        "prompt_template": "models.NAME.chat_template",
        "quantization": "models.NAME.weights",
        "rate_limit": "endpoint.limits.requests_per_minute",
        "ray_actor_options": "models.NAME.cpus",
        "request_timeout": "endpoint.request_timeout_s",
        "route_prefix": "models",
        "served_model_name": "models",
        "ssl_certfile": "endpoint.tls_certificate",
        "ssl_keyfile": "endpoint.tls_key",
        "target_ongoing_requests": "models.NAME.autoscale.target",
        "tensor_parallel_size": "models.NAME.engine_options.tensor_parallel_size",
        "threads": "models.NAME.cpus",
        "timeout": "endpoint.request_timeout_s",
        "tokenizer_name_or_path": "models.NAME.tokenizer",
        "tool_call_parser": "models.NAME.tools",
        "torch_dtype": "models.NAME.precision",
        "vllm_cpu_kvcache_space": "models.NAME.kv_cache_gib",
        "vllm_cpu_omp_threads_bind": "models.NAME.cpus",
        "workers": "models.NAME.replicas",
    },
)
# Other names: of Ray Tune, Optuna, Weights & Biases.
SWEEP = Keys(
    "sweep",
    SweepConf,
    {
        "base": "config",
        "early_terminate": "asha",
        "finetune": "config",
        "grace_period": "asha.grace",
        "max_concurrent_trials": "concurrent",
        "max_trials": "trials",
        "n_trials": "trials",
        "num_samples": "trials",
        "num_trials": "trials",
        "param_space": "search",
        "parameters": "search",
        "reduction_factor": "asha.reduction",
        "run_cap": "trials",
        "scheduler": "asha",
        "search_alg": "sampler",
        "search_space": "search",
        "space": "search",
        "template": "config",
        "time_budget": "hours",
        "time_budget_s": "hours",
        "values": "search.NAME.choice",
    },
)
