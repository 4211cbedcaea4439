"""A model's limits: token ids with embeddings, and positions per row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_ray.errors import ModelError
from llm_ray.models.folder import CONFIG, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BEYOND_ROPE = ("mpt", "ctrl")
"""Model types whose position table is neither a weight nor a buffer."""


def positions(model: PreTrainedModel) -> int | None:
    """Returns the maximum tokens per row if the model has a position table; None if positions are computed (rotary,
    relative), so that longer rows only exceed what it was trained on. The model may be without weights."""
    from torch import nn

    tables = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last) and "relative" not in last:
            # Some tables start after the padding token, or reserve entries at the beginning.
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
    """Returns the number of tokens with embeddings of the model in `path`; None if its configuration does not say.
    Raises ModelError."""
    config = read_json(path / CONFIG)
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else None


def check_tokenizer_fits(path: Path, tokenizer: Path) -> None:
    """Raises ModelError if the tokenizer in the folder `tokenizer` has tokens without an embedding in the model
    `path`."""
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
