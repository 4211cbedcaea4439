"""LoRA adapters as fast as a CPU computes them; what they are, and how they are called, stays peft's."""

from __future__ import annotations

import functools
import weakref

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


def speed_up_adapters(model: nn.Module) -> None:
    """Let LoRA layers add their adapter's output within its matrix product.

    peft casts, scales and adds in passes of their own over the layer's whole output, in the forward and again in the
    backward pass: on a CPU, and for a small model, that costs as much as the products themselves. Layers that get the
    same input, as the projections to queries, keys and values do, drop the same of its values out.
    """
    shared = _Shared()
    for layer in model.modules():
        if type(layer) is LoraLinear and len(layer.active_adapters) == 1:
            if not layer.lora_variant:
                layer.forward = functools.partial(_forward, layer, layer.active_adapters[0], shared)
            elif _is_dora(layer):
                layer.forward = functools.partial(_dora_forward, layer, layer.active_adapters[0], shared)


def set_magnitudes(model: nn.Module) -> None:
    """Let fresh DoRA layers begin as the layers that they adapt, to fp32. peft takes the lengths of the weights' rows as
    exactly as the weights are kept: in bf16 that changes the model by 0.2 % before it has learned anything."""
    for layer in model.modules():
        if type(layer) is LoraLinear and _is_dora(layer):
            (adapter,) = layer.active_adapters
            magnitude = layer.lora_magnitude_vector[adapter]
            magnitude.weight = nn.Parameter(_row_lengths(layer, adapter))


def _is_dora(layer: LoraLinear) -> bool:
    return bool(layer.lora_variant) and all(type(v) is DoraLinearVariant for v in layer.lora_variant.values())


def _dora_forward(layer: LoraLinear, adapter: str, shared: _Shared, x: Tensor) -> Tensor:
    """As peft's, but for dropout: it is on the adapter's input alone, as with LoRA, for peft's way takes the product with
    the frozen weights twice. Lengths are constants to the gradient (arXiv:2402.09353, section 4.3)."""
    given = _forward(layer, adapter, shared, x)
    scale = layer.lora_magnitude_vector[adapter].weight / _row_lengths(layer, adapter)
    bias = layer.get_base_layer().bias
    if bias is None:
        return (given * scale).to(given.dtype)  # in fp32: bf16 has too few digits for what the lengths learn
    return ((given - bias) * scale + bias).to(given.dtype)


@torch.no_grad()
def _row_lengths(layer: LoraLinear, adapter: str) -> Tensor:
    """The lengths of the rows of W + scaling B A, fp32 [out], without that matrix: |w|^2 + 2 w A'b + b A A' b."""
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
    given, kept = shared.made_of(x, dtype, share)
    base = layer.base_layer(given)
    down, up = layer.lora_A[adapter].weight.to(base.dtype), layer.lora_B[adapter].weight.to(base.dtype)
    low = F.linear(kept.to(base.dtype), down)
    return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=layer.scaling[adapter]).view(base.shape)


class _Shared:
    """What is made of the last input, for the layers that get it as well: it is cast, and its values are dropped, once.
    It is kept as long as the input itself."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._key: object = None
        self._made: tuple[Tensor | None, Tensor | None] = (None, None)
        """None: the input itself, which is not to be kept by this."""

    def made_of(self, x: Tensor, dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
        """`x` as `dtype`, and the same with a random share of its values dropped."""
        if torch.compiler.is_compiling() or x.is_inference():
            return _make(x, dtype, share)
        key = (x._version, dtype, share, torch.is_grad_enabled())
        if self._of is None or self._of() is not x or self._key != key:
            # First whose it is: with what was made of the last input, that may go as well, and is forgotten.
            self._of, self._key = weakref.ref(x, self._forget), key
            made = _make(x, dtype, share)
            self._made = (None if made[0] is x else made[0], None if made[1] is x else made[1])
        given, kept = self._made
        return x if given is None else given, x if kept is None else kept

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if gone is self._of:
            self._of, self._made = None, (None, None)


def _make(x: Tensor, dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
    given = x.to(dtype)
    return given, dropped(given, share) if share else given


def dropped(x: Tensor, share: float) -> Tensor:
    """`x` with a random share of its values set to 0, to 1/65536 exact, and the others scaled up to make up for it.

    torch's own dropout on CPUs draws 32 bits for each value, on one thread: a quarter of a step's time. Here 64 are drawn
    for four values.
    """
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[: x.numel()].view_as(x) >= round(share * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - share))
