"""Batched computation with causal transformers models, for the engine `transformers`.

``Batch`` pads rows of different lengths on the left, as `generate` does, and so supports any model that `generate`
supports in batches. Unlike there, rows join and leave at any time, and keys and values are written in place, without
copying the cache at every step. ``Alone`` holds one row of a model that does not support this (Mamba, hybrids, and
models for which `probe` finds different results in batches).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm.v1.sample.metadata import SamplingMetadata

# A cache grows by this many columns (tokens) and rows.
_COLUMNS, _ROWS = 128, 4
_GROUPED = "llm_ray_grouped"


@dataclass
class Row:
    """A request and its own state."""

    request: Request
    params: SamplingParams
    generator: torch.Generator | None = None
    """Its random number generator, if it has a seed."""


class Rows(Protocol):
    """Requests computed in one forward pass, and their state."""

    rows: list[Row]
    sampling: SamplingMetadata | None
    """Metadata for the sampler; None if the rows have changed."""

    def todo(self) -> int:
        """Returns how many tokens of the longest row are not yet computed."""

    def cells(self, more: int = 0) -> int:
        """Returns how many tokens the allocated memory can hold, after computing `more` tokens for every row."""

    def forward(self, tokens: int) -> torch.Tensor:
        """Computes the next `tokens`, at most `todo()`. Returns the logits after the last one, of shape [rows,
        vocabulary]."""

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these (in ascending order). The remaining rows may be reordered."""


def cells(rows: int, width: int) -> int:
    """Returns how many tokens a batch of this size allocates memory for."""
    return _slots(rows) * _round(width, _COLUMNS)


def _slots(rows: int) -> int:
    return rows if rows < _ROWS else _round(rows, _ROWS)


def _round(number: int, step: int) -> int:
    return -(-number // step) * step


class Batch:
    """Rows left-padded to the same width, with a growing cache."""

    def __init__(self, model: PreTrainedModel, rows: list[Row]) -> None:
        self.rows = rows
        self.sampling: SamplingMetadata | None = None
        self.width = 0
        self._model = model
        lengths = torch.tensor([row.request.num_tokens for row in rows])
        self._padding = lengths.max() - lengths
        self._cache = Cache(layer_class_to_replicate=_Layer)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options: dict[str, Any] = {"use_cache": True, "past_key_values": self._cache}
        if "logits_to_keep" in accepted:
            self._options["logits_to_keep"] = 1

    def todo(self) -> int:
        return self.rows[0].request.num_tokens + int(self._padding[0]) - self.width

    def cells(self, more: int = 0) -> int:
        return cells(len(self.rows), self.width + more)

    def forward(self, tokens: int) -> torch.Tensor:
        end = self.width + tokens
        options = dict(self._options)
        if self._padding.any():
            options["attention_mask"] = torch.arange(end) >= self._padding[:, None]
        if self._takes_positions:
            options["position_ids"] = (torch.arange(self.width, end) - self._padding[:, None]).clamp_(min=0)
        logits: torch.Tensor = self._model(input_ids=self._tokens(self.width, end), **options).logits
        self.width = end
        return logits[:, -1]

    def _tokens(self, begin: int, end: int) -> torch.Tensor:
        paddings = self._padding.tolist()
        return torch.tensor(
            [
                [0] * min(max(padding - begin, 0), end - begin)
                + row.request.all_token_ids[max(begin - padding, 0) : max(end - padding, 0)]
                for row, padding in zip(self.rows, paddings, strict=True)
            ]
        )

    def keep(self, rows: list[int]) -> None:
        kept = len(rows)
        holes = [hole for hole in range(kept) if hole not in rows]
        moves = [*zip(holes, [row for row in rows if row >= kept], strict=True)]  # the last rows fill the gaps
        for hole, row in moves:
            self.rows[hole] = self.rows[row]
            self._padding[hole] = self._padding[row]
        del self.rows[kept:]
        self._padding = self._padding[:kept]
        self.sampling = None
        if not kept:
            self._cache.layers.clear()
            return
        trim = int(self._padding.min())  # columns that only contain padding
        self._padding -= trim
        if self.width:
            self.width -= trim
            for layer in self._cache.layers:
                layer.keep(kept, moves, trim)

    def cost(self, other: Batch) -> int:
        """Returns how many columns of padding merging the batches would add."""
        rows, width = len(self.rows) + len(other.rows), max(self.width, other.width)
        return rows * width - len(self.rows) * self.width - len(other.rows) * other.width

    def absorb(self, other: Batch) -> None:
        """Appends the rows of another batch, which must not be used afterwards. All tokens of both but the last of each
        row must be computed."""
        width = max(self.width, other.width)
        for layer, more in zip(self._cache.layers, other._cache.layers, strict=True):
            layer.absorb(more)
        self._padding = torch.cat([self._padding + (width - self.width), other._padding + (width - other.width)])
        self.rows = self.rows + other.rows
        self.width = width
        self.sampling = None


class _Layer(DynamicLayer):
    """Keys and values of one layer, in tensors [slots, heads, columns, size] with spare rows and columns.

    In use are the first rows, and the columns from `_start` to `_end`. Padding is zero, since it is multiplied by an
    attention weight of zero and must not be NaN.
    """

    is_initialized: bool

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self._start = self._end = 0
        self._tensors: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values [rows, heads, tokens, size]. Returns all keys and values."""
        rows, _, tokens, _ = key_states.shape
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._tensors = [_empty(states, rows, tokens) for states in (key_states, value_states)]
            self.is_initialized = True
        elif self._end + tokens > self._tensors[0].shape[2]:
            self._move(rows, rows, self._end - self._start, tokens)
        for tensor, states in zip(self._tensors, (key_states, value_states), strict=True):
            tensor[:rows, :, self._end : self._end + tokens] = states
        self._end += tokens
        self._show(rows)
        return self.keys, self.values

    def keep(self, rows: int, moves: list[tuple[int, int]], trim: int) -> None:
        """Moves rows, then drops all but the first `rows`, and the first `trim` columns."""
        self._start += trim
        for tensor in self._tensors:
            for to, row in moves:
                tensor[to, :, self._start : self._end] = tensor[row, :, self._start : self._end]
        if _slots(rows) < len(self._tensors[0]):
            self._move(rows, rows, self._end - self._start, 0)
        self._show(rows)

    def absorb(self, other: _Layer) -> None:
        """Appends the rows of another layer, aligned at the last column."""
        had, rows = len(self.keys), len(self.keys) + len(other.keys)
        width, more = self._end - self._start, other._end - other._start
        if rows > len(self._tensors[0]) or more > width:
            self._move(had, rows, max(width, more), 0)
        for tensor, new in zip(self._tensors, (other.keys, other.values), strict=True):
            tensor[had:rows, :, self._start : self._end - more] = 0
            tensor[had:rows, :, self._end - more : self._end] = new
        self._show(rows)

    def _move(self, had: int, rows: int, width: int, more: int) -> None:
        """Copies into tensors with room for `rows`, and for `width + more` columns."""
        padding = width - (self._end - self._start)
        for index, old in enumerate(self._tensors):
            self._tensors[index] = new = _empty(old, rows, width + more)
            new[:had, :, :padding] = 0
            new[:had, :, padding:width] = old[:had, :, self._start : self._end]
        self._start, self._end = 0, width

    def _show(self, rows: int) -> None:
        self.keys, self.values = (tensor[:rows, :, self._start : self._end] for tensor in self._tensors)


def _empty(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return like.new_empty(_slots(rows), like.shape[1], _round(columns, _COLUMNS), like.shape[3])


class Alone:
    """One row of a model with any kind of state, computed as in `generate`."""

    def __init__(self, model: PreTrainedModel, rows: list[Row]) -> None:
        (_,) = self.rows = rows
        self.sampling: SamplingMetadata | None = None
        self._done = 0
        self._model = model
        self._state: dict[str, Any] = {"use_cache": True, "attention_mask": None}
        model._prepare_cache_for_generation(model.generation_config, self._state, None, 1, 0)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        if "logits_to_keep" in accepted:
            self._state["logits_to_keep"] = 1

    def todo(self) -> int:
        return self.rows[0].request.num_tokens - self._done

    def cells(self, more: int = 0) -> int:
        return cells(len(self.rows), self._done + more)

    def forward(self, tokens: int) -> torch.Tensor:
        end = self._done + tokens
        ids = torch.tensor([self.rows[0].request.all_token_ids[:end]])
        if self._takes_positions:
            self._state["position_ids"] = torch.arange(end)[None]
        remembers = any(self._state.get(name) is not None for name in ALL_CACHE_NAMES)
        inputs = self._model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=tokens if self._done and remembers else None,
            is_first_iteration=not self._done,
            **self._state,
        )
        outputs = self._model(**inputs, return_dict=True)
        self._state = self._model._update_model_kwargs_for_generation(outputs, self._state)
        self._done = end
        logits: torch.Tensor = outputs.logits
        return logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        if not rows:
            self.rows, self._state = [], {}

    def token_bytes(self) -> int:
        """Returns the memory of one token, summed over the layers whose cache grows with every token."""
        caches = [cache for name in ALL_CACHE_NAMES if isinstance(cache := self._state.get(name), Cache)]
        layers = [
            layer
            for cache in caches
            for layer in cache.layers
            if isinstance(layer, CacheLayerMixin) and layer.is_initialized
        ]
        return sum((layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2] for layer in layers)


@dataclass(frozen=True)
class Probe:
    """Measured properties of a model."""

    batches: bool
    """Whether batched rows give the same results as single ones."""
    token_bytes: int
    """Memory of a token in the cache; 0 if the state does not grow."""


def probe(model: PreTrainedModel) -> Probe:
    """Computes a few tokens of two rows of different lengths, batched and alone, and compares the results."""
    vocabulary = model.config.get_text_config().vocab_size
    short, long = ([(7 + 31 * i) % vocabulary for i in range(length)] for length in (3, 8))
    alone = Alone(model, _rows(short))
    expected = _two_steps(alone)
    size = alone.token_bytes()
    if not _plain_cache(model):
        return Probe(False, size)
    try:
        found = _two_steps(Batch(model, _rows(short, long)))
    except Exception:  # the model's own code may raise anything
        return Probe(False, size)
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    return Probe(bool((found - expected).abs().max() <= tolerance * expected.std()), size)


def _rows(*prompts: list[int]) -> list[Row]:
    params = SamplingParams()
    return [Row(Request("", prompt, params, None), params) for prompt in prompts]


def _two_steps(rows: Rows) -> torch.Tensor:
    """Returns the first row's logits after its prompt and after one more token, [2, vocabulary]."""
    first = rows.forward(rows.todo())[0]
    for row in rows.rows:
        row.request.append_output_token_ids(5)
    return torch.stack([first, rows.forward(1)[0]])


def _plain_cache(model: PreTrainedModel) -> bool:
    """Returns whether the model keeps keys and values of every token and no other state. Tokens beyond a sliding window
    are masked."""
    if not model._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def group_heads(model: PreTrainedModel) -> None:
    """Makes the model compute attention by `_grouped_attention` if it uses torch's SDPA."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(_GROUPED)


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token per row: query [rows, heads, 1, size], key and value [rows, key-value heads, columns,
    size].

    The query heads that share a key-value head are computed as tokens of a single head. With padded rows, transformers
    copies keys and values for each query head, which takes longer than all the rest. Several tokens per row (prompts)
    are left to transformers.
    """
    if softcap is not None:
        return _capped_attention(query, key, value, attention_mask, scaling, softcap), None
    rows, heads, tokens, size = query.shape
    if tokens > 1 or position_bias is not None or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, **options
        )
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    attended = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, -1), None


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores (Gemma 2), which torch's SDPA does not support and transformers omits with
    it."""
    rows, heads, tokens, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, tokens, size)
    scores = grouped @ key[:, :, None].transpose(-1, -2) * (size**-0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(tokens, key.shape[2], dtype=torch.bool).tril(key.shape[2] - tokens)[None, None]
    weights = (
        scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
        .softmax(-1, dtype=torch.float32)
        .to(value.dtype)
    )
    return (weights @ value[:, :, None]).reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous()


AttentionInterface.register(_GROUPED, _grouped_attention)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)
