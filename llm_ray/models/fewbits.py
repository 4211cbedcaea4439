"""Frozen linear layers with quantized weights, for models that do not fit in memory with 16 bits (`model.weights`).

    model = load_model(base, torch.bfloat16, bits="int4")

Each weight is quantized as it is read, so the whole model is never in memory unquantized. A layer computes with its
dequantized weights in the data type of its input: they are unpacked in each forward and again in each backward pass,
and only the packed weights are kept. Otherwise the arithmetic is that of any frozen layer.

`int8`: integers from -127 to 127, one scale per row. `int4`: integers from -8 to 7, one scale per 32 weights, such that
the weight farthest from 0 becomes -8 (as in llama.cpp's Q4_0): 4.5 bits per weight. Scales are rounded to bf16 before
the integers are computed with them, so that bf16 and fp32 weights differ only by their own rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_ray.conf.finetune import FewBits
from llm_ray.errors import ModelError

BLOCK = 32
"""Number of weights per scale in int4."""
BYTES: dict[FewBits, float] = {"int8": 1.0, "int4": 0.5 + 2 / BLOCK}
"""Bytes per weight, including scales (except for int8's: two bytes per row)."""
_METHOD = "llm-ray-few-bits"


def quantize(weight: Tensor, bits: FewBits) -> tuple[Tensor, Tensor]:
    """Quantizes a weight [out, in] to integers and bf16 scales. For int8 these are int8 [out, in] and [out, 1]; for
    int4, two integers packed per int8 [blocks / 2, 32], and [blocks, 1]."""
    if bits == "int8":
        scale = _scales(weight.float().abs().amax(1, keepdim=True) / 127)
        return (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale
    blocks = F.pad(weight.flatten().float(), (0, -weight.numel() % (2 * BLOCK))).view(-1, BLOCK)
    scale = _scales(blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8)
    integers = (blocks / scale.float()).round_().clamp_(-8, 7).to(torch.int8)
    low, high = integers.chunk(2)  # a byte packs one of each half: packed neighbours would have to be interleaved
    return (low & 15) | (high << 4), scale


def _scales(wanted: Tensor) -> Tensor:
    return torch.where(wanted == 0, 1.0, wanted).to(torch.bfloat16)


def dequantize(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Inverts :func:`quantize`; returns the weight of `shape` in `dtype`."""
    if len(packed) == len(scale):
        return packed.to(dtype).mul_(scale)
    blocks = torch.empty(2, *packed.shape, dtype=dtype)
    # In the upper half of a byte, a signed integer counts 16 times.
    torch.mul(packed << 4, (scale[: len(packed)] / 16).to(dtype), out=blocks[0])
    torch.mul(packed & -16, (scale[len(packed) :] / 16).to(dtype), out=blocks[1])
    return blocks.flatten()[: shape.numel()].view(shape)


class FewBitsLinear(nn.Linear):
    """A linear layer with a packed, frozen weight [out, in]. Gradients flow to its input."""

    def __init__(self, linear: nn.Linear, weight: Tensor, bits: FewBits) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        self.dtype = weight.dtype
        self.bias = linear.bias
        packed, scale = quantize(weight, bits)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, computed at each access."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.packed, self.scale, self._shape, dtype)

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = _Product.apply(x.to(dtype), self.packed, self.scale, self._shape)
        return product if bias is None else product + bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.bits}"


class _Product(torch.autograd.Function):
    """x Wᵀ; saves only the packed W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.shape = shape
        return F.linear(x, dequantize(packed, scale, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        return gradient @ dequantize(packed, scale, ctx.shape, gradient.dtype), None, None, None


def widened(layer: FewBitsLinear, dtype: torch.dtype) -> nn.Linear:
    """Returns an ordinary linear layer with the dequantized weights of `layer`."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.unpacked(dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear


def quantizable(model: PreTrainedModel, keep: tuple[str, ...] = ()) -> list[str]:
    """Returns the names of the linear layers to quantize: all but the output head, which may be tied to the embeddings,
    and those matching `keep`."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and not any(f".{name}".endswith(f".{kept}") or f".{kept}." in f".{name}." for kept in keep)
    ]


def check_few_bits(empty: PreTrainedModel, name: object, bits: FewBits, keep: tuple[str, ...] = ()) -> int:
    """Returns the number of weights to be quantized in a model; `empty` is the model without weights. Raises ModelError
    if quantization would not make it much smaller, or if it is quantized already."""
    key = f"model.weights is {bits}, but the model {name}"
    if getattr(empty.config, "quantization_config", None):
        raise ModelError(f"{key} is quantized already: use the model that it was quantized from")
    names = quantizable(empty, keep)
    packed = sum(cast(nn.Linear, empty.get_submodule(name)).weight.numel() for name in names)
    layers = sum(weight.numel() for weight in empty.parameters()) - sum(
        weight.numel() for end in (empty.get_input_embeddings(), empty.get_output_embeddings()) if end is not None
        for weight in end.parameters()
    )  # fmt: skip
    if packed < layers / 2:
        raise ModelError(
            f"{key} keeps most of its weights outside linear layers (such as in a mixture's experts, or in GPT-2's "
            "Conv1D), where they cannot be quantized: remove model.weights"
        )
    return packed


@register_quantization_config(_METHOD)
class FewBitsConfig(QuantizationConfigMixin):
    """Quantization settings for `from_pretrained`."""

    def __init__(self, bits: FewBits, keep: tuple[str, ...] = ()) -> None:
        self.quant_method = _METHOD
        self.bits, self.keep = bits, keep


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    """Quantizes weights while transformers reads them."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.names = {f"{name}.weight" for name in quantizable(model, self.quantization_config.keep)}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.bits)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    def __init__(self, bits: FewBits) -> None:
        self.bits = bits

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Replaces linear layers by quantized ones; returns nothing for transformers to assign."""
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            linear = cast(nn.Linear, model.get_submodule(name))
            layer = FewBitsLinear(linear, value[0] if isinstance(value, list) else value, self.bits)
            layer._is_hf_initialized = True
            model.set_submodule(name, layer)
            missing_keys.discard(key)
        return {}
