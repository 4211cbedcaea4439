"""Attention over packed rows: each row attends to itself alone, at the cost of its own length.

Rows are laid end to end in one sequence of shape [1, tokens]; scaled dot-product attention runs on each row by itself, causal and
without a mask, so that nothing is computed between rows and no [tokens, tokens] mask exists. It plugs into transformers'
attention interface; models that do not use that interface are trained on padded batches instead (``llm_ray.train.batches``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "llm_ray_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_lengths: list[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows.

    query [1, heads, tokens, size]; key, value [1, key heads, tokens, size]; `row_lengths` sums up to tokens.
    Returns [1, tokens, heads, size], as transformers' attention functions do.
    """
    lengths = row_lengths or [query.shape[2]]
    rows = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        for mask in [_window(q.shape[2], sliding_window, q.device)]
    ]
    return (torch.cat(rows, 2) if len(rows) > 1 else rows[0]).transpose(1, 2), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
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
