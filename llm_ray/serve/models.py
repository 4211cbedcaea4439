"""Derives a replica's parameters from a model's conf: folder, precision, context length, memory, cores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_ray.conf.engines import WIDEST, EngineName
from llm_ray.conf.serve import Autoscale
from llm_ray.hardware import Precision
from llm_ray.models.folder import GENERATION, read_json

Task = Literal["chat", "completions", "embeddings"]

# Longer contexts must be requested explicitly, because their cache dominates a host's memory.
DEFAULT_MAX_MODEL_LEN = 8192
# Default cache capacity in tokens over all requests, unless two requests of maximum length need more.
DEFAULT_CACHED_TOKENS = 16384
# Suffixes of architectures that generate text, as in vLLM (vllm.config.model).
_WRITERS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
# Keys of config.json for a model's maximum length.
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Sampling settings that vLLM reads from generation_config.json, with their neutral values.
NEUTRAL: Mapping[str, float | None] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_new_tokens": None,
}
# Bytes per number.
SIZES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its folder, and a hash of its files."""

    path: str
    identity: str


@dataclass(frozen=True)
class ServedModel:
    """A model to serve, with all settings resolved. It is sent to the replica."""

    name: str
    """Name that clients pass as `model`."""
    path: Path
    """Folder in Hugging Face form; for engine openvino it contains openvino_model.xml."""
    engine: EngineName = WIDEST
    tokenizer: Path | None = None
    chat_template: Path | None = None
    precision: Precision = "fp32"
    max_model_len: int = DEFAULT_MAX_MODEL_LEN
    """Longest prompt and answer together, in tokens."""
    max_batch: int = 32
    """Requests computed concurrently."""
    max_queue: int = 128
    kv_cache_bytes: int = 2**30
    memory_bytes: int = 2**31
    """Maximum memory of a replica: weights, cache, and the program itself."""
    cpus: int = 1
    """Cores reserved for a replica. 0: it shares the cores of others."""
    threads: int = 1
    """Compute threads if it shares cores."""
    replicas: int = 1
    autoscale: Autoscale | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    """LoRA adapters, by the names that clients use."""
    lora_rank: int = 0
    """Highest LoRA rank of an adapter; 0: no adapters."""
    task: Task = "chat"
    """Task by OpenAI's names: completions if there is no chat template, embeddings if the model returns vectors instead
    of text."""
    sampling: dict[str, float] = field(default_factory=dict)
    """Sampling defaults for requests that set none, where they differ from OpenAI's; named as in
    generation_config.json."""
    tool_parser: str | None = None
    trust_remote_code: bool = False
    compile: bool = False
    engine_options: dict[str, Any] = field(default_factory=dict)
    identity: str = ""
    """Hash of the model's files, so that other weights under the same path count as another model."""

    def version(self) -> str:
        """Returns a hash of all settings whose change requires new replicas."""
        fields = asdict(self) | {"autoscale": None, "replicas": None, "adapters": None}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sampling(path: Path) -> dict[str, float]:
    """Returns the sampling settings of the model's generation_config.json that differ from OpenAI's defaults."""
    own = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    return {name: own[name] for name, neutral in NEUTRAL.items() if own.get(name) not in (None, neutral)}


def longest(path: Path, asked: int | None) -> int:
    """Returns the maximum length of prompt plus answer, in tokens: `asked` if given, else the model's own maximum,
    capped at DEFAULT_MAX_MODEL_LEN."""
    return asked or min(made_for(path) or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)


def made_for(path: Path) -> int | None:
    """Returns the model's maximum length in tokens, as vLLM reads it from config.json; None if unknown."""
    config = text_config(path)
    lengths = [int(config[key]) for key in _LENGTHS if isinstance(config.get(key), int | float)]
    if not lengths:
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    stretched = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic") and not str(
        config.get("model_type")
    ).startswith("gemma3")
    return int(min(lengths) * ((rope.get("factor") or 1) if stretched else 1))


def writes(path: Path, engine_options: Mapping[str, Any]) -> bool:
    """Whether the model generates text rather than vectors, decided as in vLLM; engine_options can override it."""
    if (runner := engine_options.get("runner", "auto")) != "auto":
        return bool(runner == "generate")
    if (path / "modules.json").is_file():  # Sentence Transformers, regardless of the architecture
        return False
    return any(
        name.endswith(_WRITERS) for name in read_json(path / "config.json").get("architectures") or ["ForCausalLM"]
    )


def kv_cache_bytes(path: Path, precision: Precision, max_model_len: int) -> int:
    """Returns the size of the key-value cache in bytes, from the model's layers and heads, for DEFAULT_CACHED_TOKENS or
    two requests of maximum length, whichever is larger."""
    config = text_config(path)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    head_dim = int(config.get("head_dim") or hidden // heads)
    per_token = 2 * layers * int(config.get("num_key_value_heads") or heads) * head_dim * SIZES[precision]
    return int(per_token * max(DEFAULT_CACHED_TOKENS, 2 * max_model_len))


def text_config(path: Path) -> dict[str, Any]:
    """Returns the language model's part of config.json."""
    config = read_json(path / "config.json")
    text: dict[str, Any] = config.get("text_config") or config  # multimodal models keep it separate
    return text
