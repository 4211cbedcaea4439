"""Attention over packed rows: each row attends to itself alone, at the cost of its own length.

Rows are laid end to end in one sequence of shape [1, tokens]; scaled dot-product attention runs on each row by itself,
causal and without a mask, so that nothing is computed between rows and no [tokens, tokens] mask exists. It plugs into
transformers' attention interface. Models for which that is not the same as each row alone (``why_not_packed`` tries it
on the very model) are trained on padded batches instead (``llm_ray.train.batches``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llm_ray.errors import ModelError

NAME = "llm_ray_packed"
SHORT = 256
"""Longest row, in tokens, whose attention is computed by plain matrix products in bf16."""
PROBE_ROWS = (21, 13)
"""Tokens of the two rows that are tried packed and alone."""
EXACT, ROUNDED = (1e-3, 1e-4), (1e-1, 1e-2)
"""In fp32, and with 16 bits: how far logits may lie from those of each row alone, and from those beside another
neighbour, as shares of their spread. Beside another neighbour little but the neighbour differs; alone, matrix products
have other shapes, and round otherwise: with 16 bits a model may make anything of that, so that fp32 decides where the
model can be computed so."""
_PASSED = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "cache_position",
    "past_key_values",
    "past_key_value",
    "output_hidden_states",
}
_PASSED |= {"is_causal", "output_router_logits", "logits_to_keep", "return_dict", "inputs_embeds"}
"""What models hand to attention functions beside tensors, and which changes nothing here."""


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows.

    query [1, heads, tokens, size]; key, value [1, key heads, tokens, size]; the rows are those of :func:`set_rows`.
    Returns [1, tokens, heads, size], as transformers' attention functions do. Raises ValueError where the model asks
    for what is not computed here (a mask or bias of its own, soft caps, sinks, attention that looks ahead).
    """
    if attention_mask is not None:
        raise ValueError("its attention has a mask or bias of its own")
    if beyond := [name for name, value in others.items() if value is not None and name not in _PASSED]:
        raise ValueError(f"its attention has {', '.join(beyond)}")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError("its attention is not causal")
    split = zip(query.split(_rows, 2), key.split(_rows, 2), value.split(_rows, 2), strict=True)
    rows = [_attend(q, k, v, scaling or q.shape[3] ** -0.5, dropout, sliding_window) for q, k, v in split]
    return (torch.cat(rows, 2) if len(rows) > 1 else rows[0]).transpose(1, 2).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, sliding_window: int | None) -> Tensor:
    length = q.shape[2]
    if sliding_window is not None and length > sliding_window:
        return F.scaled_dot_product_attention(
            q, k, v, _window(length, sliding_window), dropout, scale=scale, enable_gqa=True
        )
    if q.dtype == torch.bfloat16 and length <= SHORT and not dropout:
        return _attend_short(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=True)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one short row by plain matrix products, the query heads of a key head stacked.

    torch's fused kernel for CPUs multiplies bf16 blocks slowly in the backward pass; a short row's scores fit the cache
    anyway.
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
    """Switch `model`, which has its weights, to packed attention; False (and the model unchanged) where
    `why_not_packed` says why not."""
    if why_not_packed(model):
        return False
    switch_to_packed(model)
    return True


def switch_to_packed(model: PreTrainedModel) -> None:
    """Have `model` (which may be without weights) compute packed attention."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)


def why_not_packed(model: PreTrainedModel) -> str:
    """Why the rows of a batch cannot be laid end to end for `model`, which has its weights; empty where they can.

    They cannot where its attention is outside transformers' interface, has what is not computed here (soft caps, sinks,
    biases), or where anything else runs along the sequence (convolutions, recurrent states, positions counted from the
    start). What the configuration does not tell shows in what the model computes: of two rows packed, against each
    alone, and beside another neighbour. Raises ModelError where the model cannot be called with tokens at all.
    """
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if not model._supports_attention_backend:
        return "its attention is outside transformers' attention interface"
    if others:
        return f"it has layers of type {', '.join(others)}"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention has a soft cap"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    training, before = model.training, model.config._attn_implementation
    model.eval()
    try:
        with in_fp32(model), torch.autocast("cpu", enabled=False), contextlib.suppress(ModelError):
            return _probe(model, *EXACT)
        model.set_attn_implementation(before)
        return _probe(model, *ROUNDED)
    finally:
        model.set_attn_implementation(before)
        model.train(training)


@contextlib.contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Have the modules of `model` compute with their weights in fp32, one module's at a time: there may be no memory
    for a copy of all."""
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        for weight in module.parameters(recurse=False):
            if weight.dtype in (torch.bfloat16, torch.float16):
                narrow[weight] = weight.data
                weight.data = weight.data.float()

    def restore(module: nn.Module, *_: object) -> None:
        for weight in module.parameters(recurse=False):
            if weight in narrow:
                weight.data = narrow.pop(weight)

    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(restore) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, data in narrow.items():
            weight.data = data


@torch.no_grad()
def _probe(model: PreTrainedModel, unlike: float, leak: float) -> str:
    """Compute two rows alone, packed, and packed beside another neighbour; what differs by more than these shares of
    the logits' spread, in words. Raises ModelError."""
    vocabulary = model.config.get_text_config().vocab_size
    # From all over the vocabulary: the first ids are special ones, of which a model may have learnt nothing.
    first, second = (torch.arange(1, 1 + length)[None] * 7919 % vocabulary for length in PROBE_ROWS)
    other, positions = (first + 29) % vocabulary, torch.cat([torch.arange(length) for length in PROBE_ROWS])[None]
    try:
        alone = [
            model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits.float()
            for row in (first, second)
        ]
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise ModelError(
            f"a model of type {type(model).__name__} cannot compute a row of tokens: {_first_line(error)}"
        ) from error

    def packed(*rows: Tensor) -> list[Tensor]:
        set_rows(list(PROBE_ROWS))
        logits = model(input_ids=torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
        return list(logits.float().split(PROBE_ROWS, 1))

    switch_to_packed(model)
    try:
        together, beside, swapped = (
            packed(first, second),
            packed(other, second),
            packed(first, (second + 29) % vocabulary),
        )
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        return _first_line(error)
    apart = max(_difference(beside[1], together[1]), _difference(swapped[0], together[0]))
    if not apart <= leak:
        return f"rows affect their neighbours (logits differ by {apart:.2g} of their spread)"
    apart = max(_difference(a, b) for a, b in zip(together, alone, strict=True))
    if not apart <= unlike:
        return f"packed rows get other logits than alone (they differ by {apart:.2g} of their spread)"
    return ""


def _difference(given: Tensor, wanted: Tensor) -> float:
    """How far logits [1, tokens, vocabulary] lie from the wanted ones, as a share of the spread of those, at the worst
    token."""
    finite = wanted.isfinite()
    if not torch.equal(finite, given.isfinite()):
        return float("inf")
    apart = torch.where(finite, given - wanted, 0.0).norm(dim=-1)
    spread = torch.where(finite, wanted - torch.where(finite, wanted, 0.0).mean(), 0.0).norm(dim=-1).mean()
    return float((apart / spread.clamp(min=1e-9)).max())


def _first_line(error: Exception) -> str:
    return f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{(str(error).splitlines() or [''])[0][:200]}"
