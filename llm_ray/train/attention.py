"""Attention over packed rows: each row attends to itself alone, at the cost of its own length.

Rows are laid end to end in one sequence of shape [1, tokens]; scaled dot-product attention runs on each row by itself, causal and
without a mask, so that nothing is computed between rows and no [tokens, tokens] mask exists. It plugs into transformers'
attention interface; models that do not use that interface are trained on padded batches instead (``llm_ray.train.batches``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "llm_ray_packed"
SHORT = 256
"""Longest row, in tokens, whose attention is computed by plain matrix products in bf16."""


_rows: list[int] = []


def set_rows(lengths: list[int]) -> None:
    """Say how many tokens each row of the sequence has that the model is about to be called with.

    It does not go through the model's arguments: torch.compile would compile anew for each number of rows.
    """
    _rows[:] = lengths


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows.

    query [1, heads, tokens, size]; key, value [1, key heads, tokens, size]; the rows are those of :func:`set_rows`.
    Returns [1, tokens, heads, size], as transformers' attention functions do.
    """
    split = zip(query.split(_rows, 2), key.split(_rows, 2), value.split(_rows, 2), strict=True)
    rows = [_attend(q, k, v, scaling or q.shape[3] ** -0.5, dropout, sliding_window) for q, k, v in split]
    return (torch.cat(rows, 2) if len(rows) > 1 else rows[0]).transpose(1, 2), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, sliding_window: int | None) -> Tensor:
    length = q.shape[2]
    if sliding_window is not None and length > sliding_window:
        return F.scaled_dot_product_attention(q, k, v, _window(length, sliding_window), dropout, scale=scale, enable_gqa=True)
    if q.dtype == torch.bfloat16 and length <= SHORT and not dropout:
        return _attend_short(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=True)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one short row by plain matrix products, the query heads of a key head stacked.

    torch's fused kernel for CPUs multiplies bf16 blocks slowly in the backward pass; a short row's scores fit the cache anyway.
    """
    _, heads, length, size = q.shape
    groups = k.shape[1]
    stacked = q.reshape(groups, heads // groups * length, size)
    scores = torch.baddbmm(_causal(length, heads // groups, q.dtype), stacked, k[0].transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v[0]).view(1, heads, length, v.shape[3])


@functools.lru_cache(maxsize=64)
def _causal(length: int, stacked: int, dtype: torch.dtype) -> Tensor:
    """[stacked × length, length]: minus infinity where a position would look ahead."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1).repeat(stacked, 1)


def _window(length: int, sliding_window: int) -> Tensor:
    """[length, length], true where a position may look."""
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switch `model` to packed attention; False (and the model unchanged) when its code cannot do that faithfully.

    Not possible: attention outside transformers' interface, layers whose state runs along the sequence (Mamba, linear
    attention), and attention with a logit softcap or sinks, which scaled dot-product attention does not have.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not model._supports_attention_backend or not layer_types <= {"full_attention", "sliding_attention"}:
        return False
    if getattr(config, "attn_logit_softcapping", None) or any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
    return True
