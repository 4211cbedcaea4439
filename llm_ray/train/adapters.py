"""Fast LoRA and DoRA layers for CPUs. Definition and names of the adapters stay peft's."""

from __future__ import annotations

import functools
import weakref

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


def speed_up_adapters(model: nn.Module) -> None:
    """Makes LoRA layers scale and add the adapter's output within its matrix product (one addmm).

    peft casts, scales and adds in separate passes over the layer's whole output, forward and backward: on a CPU and for
    a small model, these cost as much as the products themselves. Layers with the same input, such as the query, key and
    value projections, share its dropout mask.
    """
    shared = _Shared()
    for layer in model.modules():
        if type(layer) is LoraLinear and len(layer.active_adapters) == 1:
            if not layer.lora_variant:
                layer.forward = functools.partial(_forward, layer, layer.active_adapters[0], shared)
            elif _is_dora(layer):
                layer.forward = functools.partial(_dora_forward, layer, layer.active_adapters[0], shared)


def set_magnitudes(model: nn.Module) -> None:
    """Sets fresh DoRA magnitudes in fp32, so that the layers start equal to the ones they adapt. peft computes the row
    norms in the weights' dtype: in bf16 that changes the model by 0.2 % before any training."""
    for layer in model.modules():
        if type(layer) is LoraLinear and _is_dora(layer):
            (adapter,) = layer.active_adapters
            magnitude = layer.lora_magnitude_vector[adapter]
            magnitude.weight = nn.Parameter(_row_lengths(layer, adapter))


def _is_dora(layer: LoraLinear) -> bool:
    return bool(layer.lora_variant) and all(type(v) is DoraLinearVariant for v in layer.lora_variant.values())


def _dora_forward(layer: LoraLinear, adapter: str, shared: _Shared, x: Tensor) -> Tensor:
    """DoRA like peft's, except that dropout is applied only to the adapter's input, as with LoRA: peft's way multiplies
    with the frozen weights twice. Row norms are constants in the gradient (arXiv:2402.09353, section 4.3)."""
    output = _forward(layer, adapter, shared, x)
    scale = layer.lora_magnitude_vector[adapter].weight / _row_lengths(layer, adapter)
    bias = layer.get_base_layer().bias
    if bias is None:
        return (output * scale).to(output.dtype)  # in fp32: bf16 is too coarse for changes of the magnitudes
    return ((output - bias) * scale + bias).to(output.dtype)


@torch.no_grad()
def _row_lengths(layer: LoraLinear, adapter: str) -> Tensor:
    """Row norms of W + scaling B A, fp32 [out], without building that matrix: sqrt(|w|^2 + 2 w A'b + b A A' b)."""
    with torch.autocast("cpu", enabled=False):
        weight = layer.get_base_layer().weight.float()
        weight = weight.t() if layer.fan_in_fan_out else weight
        down, up = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float() * layer.scaling[adapter]
        inner = 2 * weight @ down.t() + up @ (down @ down.t())
        return (weight.square().sum(1) + (inner * up).sum(1)).sqrt()


def _forward(layer: LoraLinear, adapter: str, shared: _Shared, x: Tensor) -> Tensor:
    dropout = layer.lora_dropout[adapter]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    cast, masked = shared.copies_of(x, dtype, share)
    base = layer.base_layer(cast)
    down, up = layer.lora_A[adapter].weight.to(base.dtype), layer.lora_B[adapter].weight.to(base.dtype)
    low = F.linear(masked.to(base.dtype), down)
    return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=layer.scaling[adapter]).view(base.shape)


class _Shared:
    """Caches the cast and the dropped-out copy of the last input for other layers with the same input, as long as that
    input lives."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._key: object = None
        self._copies: tuple[Tensor | None, Tensor | None] = (None, None)
        """None stands for the input itself, which the cache must not keep alive."""

    def copies_of(self, x: Tensor, dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
        """Returns `x` as `dtype`, and the same with a random share of its values dropped."""
        if torch.compiler.is_compiling() or x.is_inference():
            return _copies(x, dtype, share)
        key = (x._version, dtype, share, torch.is_grad_enabled())
        if self._of is None or self._of() is not x or self._key != key:
            # Set the reference first: freeing the old copies may free the old input, whose callback would then clear
            # the new ones.
            self._of, self._key = weakref.ref(x, self._clear), key
            copies = _copies(x, dtype, share)
            self._copies = (None if copies[0] is x else copies[0], None if copies[1] is x else copies[1])
        cast, masked = self._copies
        return x if cast is None else cast, x if masked is None else masked

    def _clear(self, gone: weakref.ref[Tensor]) -> None:
        if gone is self._of:
            self._of, self._copies = None, (None, None)


def _copies(x: Tensor, dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
    cast = x.to(dtype)
    return cast, dropped(cast, share) if share else cast


def dropped(x: Tensor, share: float) -> Tensor:
    """Returns `x` with a random `share` (in steps of 1/65536) of its values set to 0, and the others divided by
    1 - share.

    torch's CPU dropout draws 32 bits per value on one thread: a quarter of a step's time. This draws 64 bits per four
    values.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view_as(x) >= round(share * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - share))
