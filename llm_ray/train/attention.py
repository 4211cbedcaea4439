"""Attention over packed rows: each row attends only to itself, at the cost of its own length.

Rows are concatenated into one sequence of shape [1, tokens]. Causal scaled dot-product attention runs on each row
separately, so nothing is computed across rows and no [tokens, tokens] mask is built. It plugs into transformers'
attention interface. Models whose results packing would change (``why_not_packed`` tests the loaded model) are trained
on padded batches instead (``llm_ray.train.batches``).
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
"""Longest row, in tokens, whose bf16 attention is computed by plain matrix products."""
PROBE_ROWS = (21, 13)
"""Tokens of the two rows with which packing is tested."""
EXACT, ROUNDED = (1e-3, 1e-4), (1e-1, 1e-2)
"""Tolerances in fp32, and in 16 bits: how much packed logits may differ from those of each row alone, and between
packings with different neighbours, as fractions of the logits' spread. With a different neighbour nothing else changes;
alone, matrix products have other shapes and round differently. In 16 bits a model may amplify that arbitrarily, so fp32
decides where the model can run in it."""
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
"""Further arguments that models pass to attention functions, and that have no effect here."""


_rows: list[int] = []


def set_rows(lengths: list[int]) -> None:
    """Sets the tokens per row of the sequence for the model's next call.

    Not an argument of the model, because torch.compile would recompile for each number of rows.
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

    query [1, heads, tokens, size]; key, value [1, key heads, tokens, size]; rows as set by :func:`set_rows`. Returns
    [1, tokens, heads, size], like transformers' attention functions. Raises ValueError if the model needs a feature
    that is not implemented here (its own mask or bias, soft caps, sinks, non-causal attention).
    """
    if attention_mask is not None:
        raise ValueError("its attention has a mask or bias of its own")
    if unsupported := [name for name, value in others.items() if value is not None and name not in _PASSED]:
        raise ValueError(f"its attention has {', '.join(unsupported)}")
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
    """Attention of one short row by plain matrix products, with the query heads of each key head stacked.

    torch's fused CPU kernel multiplies bf16 blocks slowly in the backward pass, and a short row's scores fit the cache
    anyway.
    """
    _, heads, length, size = q.shape
    groups = k.shape[1]
    stacked = q.reshape(groups, heads // groups * length, size)
    scores = torch.baddbmm(_causal(length, heads // groups, q.dtype), stacked, k[0].transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v[0]).view(1, heads, length, v.shape[3])


@functools.lru_cache(maxsize=64)
def _causal(length: int, stacked: int, dtype: torch.dtype) -> Tensor:
    """[stacked × length, length]: minus infinity at future positions."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1).repeat(stacked, 1)


def _window(length: int, sliding_window: int) -> Tensor:
    """[length, length]: true where a position may attend."""
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switches `model`, which must have its weights, to packed attention. Returns False and leaves the model unchanged
    if `why_not_packed` gives a reason."""
    if why_not_packed(model):
        return False
    switch_to_packed(model)
    return True


def switch_to_packed(model: PreTrainedModel) -> None:
    """Switches `model`, with or without weights, to packed attention."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)


def why_not_packed(model: PreTrainedModel) -> str:
    """Returns why rows cannot be packed for `model`, which must have its weights; empty if they can.

    Reasons are attention outside transformers' interface, attention features not implemented here (soft caps, sinks,
    biases), and other operations along the sequence (convolutions, recurrent states, positions counted from the start).
    What the configuration does not show is tested: two rows are computed packed, each alone, and beside other
    neighbours. Raises ModelError if the model cannot process tokens at all.
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
    """Lets the modules of `model` compute with fp32 weights, converting one module at a time: memory may not suffice
    for a full copy."""
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
    """Computes two rows alone, packed, and packed beside other neighbours. Returns a message if logits differ from
    those alone by more than `unlike`, or between neighbours by more than `leak` (fractions of their spread), or if the
    packed model raises an error. Raises ModelError if the model cannot compute the rows alone."""
    vocabulary = model.config.get_text_config().vocab_size
    # Ids spread over the vocabulary: the first ones are special tokens, which may be untrained.
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
    difference = max(_difference(beside[1], together[1]), _difference(swapped[0], together[0]))
    if not difference <= leak:
        return f"rows affect their neighbours (logits differ by {difference:.2g} of their spread)"
    difference = max(_difference(a, b) for a, b in zip(together, alone, strict=True))
    if not difference <= unlike:
        return f"packed rows get different logits than single rows (they differ by {difference:.2g} of their spread)"
    return ""


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Largest distance of a token's logits [1, tokens, vocabulary] from the expected ones, as a fraction of the mean
    spread of those."""
    finite = expected.isfinite()
    if not torch.equal(finite, logits.isfinite()):
        return float("inf")
    distance = torch.where(finite, logits - expected, 0.0).norm(dim=-1)
    spread = torch.where(finite, expected - torch.where(finite, expected, 0.0).mean(), 0.0).norm(dim=-1).mean()
    return float((distance / spread.clamp(min=1e-9)).max())


def _first_line(error: Exception) -> str:
    return f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{(str(error).splitlines() or [''])[0][:200]}"
