"""From a model's conf to the parameters of a replica: folder, arithmetic, context, memory, cores."""

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

# More than this is taken only when asked for: the cache of a long context is what fills a host's memory.
DEFAULT_MAX_MODEL_LEN = 8192
# Tokens of all requests at once that the cache holds by default, if that is room for two of the longest.
DEFAULT_CACHED_TOKENS = 16384
# Ends of the names of architectures that write text, as vLLM tells them (vllm.config.model).
_WRITERS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
# What config.json calls the most tokens of a model.
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
# Settings of sampling that vLLM takes from generation_config.json, as they are where nothing is set.
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
# Bytes of a number.
SIZES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its folder, and a hash of its files."""

    path: str
    identity: str


@dataclass(frozen=True)
class ServedModel:
    """A model as it is to be served, everything decided. It travels to the replica."""

    name: str
    """What clients call it: the `model` of a request."""
    path: Path
    """The model's folder: Hugging Face's form, for engine openvino with openvino_model.xml in it."""
    engine: EngineName = WIDEST
    tokenizer: Path | None = None
    chat_template: Path | None = None
    precision: Precision = "fp32"
    max_model_len: int = DEFAULT_MAX_MODEL_LEN
    """Longest prompt and answer together, in tokens."""
    max_batch: int = 32
    """Requests computed at the same time."""
    max_queue: int = 128
    kv_cache_bytes: int = 2**30
    memory_bytes: int = 2**31
    """What a replica takes at most: weights, cache, and the program itself."""
    cpus: int = 1
    """Cores of a replica, its own. 0: it shares those of others."""
    threads: int = 1
    """Compute threads where it shares cores."""
    replicas: int = 1
    autoscale: Autoscale | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    """LoRA adapters on it, by the name clients call them."""
    lora_rank: int = 0
    """Highest rank that an adapter may have; 0: no adapters."""
    task: Task = "chat"
    """What it is for, by OpenAI's names: completions without a chat template, embeddings where it makes vectors in
    place of text."""
    sampling: dict[str, float] = field(default_factory=dict)
    """What samples the answer to a request that does not say, where that is not as OpenAI has it: by
    generation_config.json's names."""
    tool_parser: str | None = None
    trust_remote_code: bool = False
    compile: bool = False
    engine_options: dict[str, Any] = field(default_factory=dict)
    identity: str = ""
    """Hash of the model's files: other weights under the same path are another model."""

    def version(self) -> str:
        """Hash of all that a replica has to be started anew for."""
        fields = asdict(self) | {"autoscale": None, "replicas": None, "adapters": None}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sampling(path: Path) -> dict[str, float]:
    """What the model's generation_config.json sets of sampling, other than OpenAI's defaults."""
    own = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    return {name: own[name] for name, neutral in NEUTRAL.items() if own.get(name) not in (None, neutral)}


def longest(path: Path, asked: int | None) -> int:
    """Longest prompt and answer together, in tokens: as asked, else what the model was made for, at most
    DEFAULT_MAX_MODEL_LEN."""
    return asked or min(made_for(path) or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)


def made_for(path: Path) -> int | None:
    """Most tokens that the model was made for, as vLLM reads it from config.json; None where that does not say."""
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
    """Whether the model writes text, rather than making vectors: as vLLM decides it where engine_options say
    nothing."""
    if (runner := engine_options.get("runner", "auto")) != "auto":
        return bool(runner == "generate")
    if (path / "modules.json").is_file():  # of Sentence Transformers, whatever the architecture
        return False
    return any(
        name.endswith(_WRITERS) for name in read_json(path / "config.json").get("architectures") or ["ForCausalLM"]
    )


def kv_cache_bytes(path: Path, precision: Precision, max_model_len: int) -> int:
    """Bytes of the key and value cache, from the model's layers and heads, for DEFAULT_CACHED_TOKENS or two of the
    longest requests."""
    config = text_config(path)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    head_dim = int(config.get("head_dim") or hidden // heads)
    per_token = 2 * layers * int(config.get("num_key_value_heads") or heads) * head_dim * SIZES[precision]
    return int(per_token * max(DEFAULT_CACHED_TOKENS, 2 * max_model_len))


def text_config(path: Path) -> dict[str, Any]:
    """The language model's part of config.json."""
    config = read_json(path / "config.json")
    text: dict[str, Any] = config.get("text_config") or config  # models that see, too, keep their language part apart
    return text
