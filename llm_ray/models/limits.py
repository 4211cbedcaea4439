"""A model's limits: tokens beyond its embeddings, and rows beyond its positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_ray.errors import ModelError
from llm_ray.models.folder import CONFIG, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BEYOND_ROPE = ("mpt", "ctrl")
"""Kinds whose table of positions is neither a weight nor a buffer."""


def positions(model: PreTrainedModel) -> int | None:
    """Most tokens of a row for which the model (which may be without weights) has positions, where it has a table of
    them; None where they are computed (rotary and relative ones), so that longer rows are only beyond what it was
    trained on."""
    from torch import nn

    tables = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last) and "relative" not in last:
            # Some begin to count after the padding token, or leave room at the beginning.
            first = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            tables.append(module.num_embeddings - first)
    tables += [
        buffer.shape[0] for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "embed_positions"
    ]
    config = model.config.get_text_config()
    if config.model_type in _BEYOND_ROPE:
        tables.append(getattr(config, "max_seq_len", None) or config.n_positions)
    return min(tables, default=None)


def vocabulary(path: Path) -> int | None:
    """How many tokens the model in the folder `path` has embeddings for; None where its configuration does not say.
    Raises ModelError."""
    config = read_json(path / CONFIG)
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else None


def check_tokenizer_fits(path: Path, tokenizer: Path) -> None:
    """Raise ModelError where the tokenizer in the folder `tokenizer` has tokens for which the model in `path` has no
    embedding."""
    most = vocabulary(path)
    if most is None or not (tokenizer / "tokenizer.json").is_file():
        return
    definition = read_json(tokenizer / "tokenizer.json")
    known = (definition.get("model") or {}).get("vocab") or {}
    ids: dict[str, int] = (
        {**known} if isinstance(known, dict) else {str(entry[0]): number for number, entry in enumerate(known)}
    )
    ids |= {token["content"]: token["id"] for token in definition.get("added_tokens") or []}
    if beyond := sorted((number, token) for token, number in ids.items() if number >= most):
        raise ModelError(
            f"{tokenizer}: the tokenizer has {len(beyond)} tokens for which the model in {path} has no embedding, "
            f"such as {beyond[0][1]!r} ({beyond[0][0]}; {CONFIG}: vocab_size {most}): a request with one would crash "
            "the engine. Use the model's own tokenizer, or remove them"
        )
