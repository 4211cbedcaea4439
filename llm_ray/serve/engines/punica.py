"""LoRA in vLLM's CPU engine: multiplies each adapter's matrices with the rows of its own requests.

vLLM's CPU kernels look up matrices by each row's slot, and "no adapter" is slot -1, which torch resolves to the last
slot: with all slots in use, requests to the base model were answered with an adapter's weights. They also copy both
matrices for every row.

vLLM computes a mixture of experts with adapters by Triton kernels, which do not exist for CPUs: the engine died at the
first token, whichever layers the adapters changed. Here the experts use the CPU kernels, without adapters.

vLLM ignores an adapter's layers that its own model does not have by that name (Mixtral's router). Here such an adapter
is rejected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.platforms import current_platform

Rows = list[tuple[int, Tensor]]
"""Slots in use, each with the indices of its rows."""


class SlotwisePunica(PunicaWrapperCPU):
    """vLLM's wrapper of LoRA kernels, which leaves rows without an adapter unchanged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tokens: Rows = []
        self._samples: Rows = []

    def update_metadata(self, *args: Any, **options: Any) -> None:
        super().update_metadata(*args, **options)
        self._tokens, self._samples = _rows(self.token_lora_indices), _rows(self.sampler_indices)

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        _add_products(y, x, w_t_all, self._tokens, scale)

    def _apply_expand(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool = True
    ) -> None:
        _add_products(y[:, y_offset : y_offset + y_slice_size], x, w_t_all, self._tokens)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        _add_products(y, x, lora_b_stacked, self._tokens)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **_: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        low = x.new_zeros(len(x), lora_b_stacked.shape[-1])
        _add_products(low, x, lora_a_stacked, self._samples, scale)
        # Logits may be wider than the vocabulary, or narrower than the largest classification head.
        width = min(y.shape[-1], lora_b_stacked.shape[-2])
        _add_products(y.view(-1, y.shape[-1])[:, :width], low, lora_b_stacked[..., :width, :], self._samples)


class WholeAdapters(LRUCacheLoRAModelManager):
    """vLLM's manager of a model's adapters, which rejects an adapter if any of its layers is not applied."""

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        super()._create_merged_loras_inplace(lora_model)
        used = {id(self._get_lora_layer_weights(lora_model, module)) for module in self.modules}
        if left := sorted(layer for layer, weights in lora_model.loras.items() if id(weights) not in used):
            raise ValueError(f"vLLM does not support adapters on {left[0]}{' and others' if left[1:] else ''}")


@contextlib.contextmanager
def lora_on_cpus() -> Iterator[None]:
    """Within this context, new engines compute LoRA as described at the top of this module."""
    ours = f"{SlotwisePunica.__module__}.{SlotwisePunica.__name__}"
    with (  # vLLM has no parameters for these
        patch.object(type(current_platform), "get_punica_wrapper", lambda _: ours),
        patch.object(LRUCacheWorkerLoRAManager, "_manager_cls", WholeAdapters),
        patch.object(FusedMoEConfig, "is_lora_enabled", property(lambda _: False, lambda *_: None)),
        patch.object(FusedMoEWithLoRA, "can_replace_layer", lambda **_: False),
        patch.object(FusedMoE3DWithLoRA, "can_replace_layer", lambda **_: False),
    ):
        yield


def _rows(slots: Tensor) -> Rows:
    return [(slot, (slots == slot).nonzero().squeeze(1)) for slot in slots.unique().tolist() if slot >= 0]


def _add_products(y: Tensor, x: Tensor, stacked: Tensor, rows: Rows, scale: float = 1.0) -> None:
    """Adds to each row of `y` [rows, out] the row of `x` [rows, in] times its slot's matrix in `stacked` [slots, 1,
    out, in], multiplied in the dtype of `stacked`."""
    for slot, own in rows:
        y.index_add_(0, own, F.linear(x[own].to(stacked.dtype), stacked[slot, 0]).to(y.dtype), alpha=scale)
