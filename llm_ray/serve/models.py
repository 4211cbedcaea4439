"""A model to serve, and the memory its requests need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_ray.hardware import cpu_flags, has_bf16
from llm_ray.models.folder import check_folder, read_json

# More than this is taken only when asked for: the cache of a long context is what fills a host's memory.
DEFAULT_MAX_MODEL_LEN = 8192
# Tokens of all requests at once that the cache holds by default, if that is room for two of the longest.
DEFAULT_CACHED_TOKENS = 16384
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class ServedModel:
    """A model as it is to be served."""

    name: str
    """What clients call it: the `model` of a request."""
    path: Path
    """A Hugging Face folder: weights, tokenizer, chat template."""
    cpus: int = 1
    """Cores of the replica, its own where the host has them free."""
    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens. None: the model's, at most 8192."""
    kv_cache_gib: float | None = None
    """Memory for the keys and values of running requests. None: room for 16384 tokens, and for two requests of the longest."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic. auto: that of the weights; bf16 only where the CPU multiplies it in hardware."""
    enforce_eager: bool = True
    """False compiles the model first: slower to start, faster to answer."""


def choose_dtype(model: ServedModel) -> Literal["fp32", "bf16"]:
    """The arithmetic to use. Weights stored in fp32 are not rounded to bf16 unasked: a small model's close calls would fall otherwise."""
    if model.dtype != "auto":
        return model.dtype
    return "bf16" if check_folder(model.path).dtype in ("bf16", "fp16") and has_bf16(cpu_flags()) else "fp32"


def longest(model: ServedModel) -> int:
    """Longest prompt and answer together, in tokens."""
    return model.max_model_len or min(
        int(_text_config(model.path).get("max_position_embeddings", DEFAULT_MAX_MODEL_LEN)), DEFAULT_MAX_MODEL_LEN
    )


def kv_cache_bytes(model: ServedModel, precision: Literal["fp32", "bf16"]) -> int:
    """Bytes of the key and value cache: as asked for, else from the model's layers, heads and `longest`."""
    if model.kv_cache_gib is not None:
        return int(model.kv_cache_gib * 2**30)
    config = _text_config(model.path)
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    per_token = 2 * int(config["num_hidden_layers"]) * int(config.get("num_key_value_heads") or heads) * head_dim * _BYTES[precision]
    return per_token * max(DEFAULT_CACHED_TOKENS, 2 * longest(model))


def _text_config(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    text: dict[str, Any] = config.get("text_config") or config  # models that see, too, keep their language part apart
    return text
