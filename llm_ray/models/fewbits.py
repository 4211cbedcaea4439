"""Frozen linear layers in few bits, for models that memory does not hold in 16 (`model.weights`).

    model = load_model(base, torch.bfloat16, bits="int4")

Each weight is quantized as soon as it has been read, so that the model is never whole in memory. A layer multiplies by
its weights as they are quantized, in the data type of its input: they are unpacked for each product, in the forward and
again in the backward pass, and nothing but the packed weights is kept. Arithmetic is that of any other frozen layer.

`int8`: integers from -127 to 127, one scale a row. `int4`: integers from -8 to 7, one scale for each 32 weights, such
that the one farthest from 0 is -8 (as llama.cpp's Q4_0): 4.5 bits a weight. Scales are bf16, and integers are rounded
with them as they are kept, so that weights in bf16 and in fp32 differ by nothing but their own rounding.
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
"""Weights that share a scale in int4."""
BYTES: dict[FewBits, float] = {"int8": 1.0, "int4": 0.5 + 2 / BLOCK}
"""Of a weight, scales included (but for those of int8: two bytes a row)."""
_METHOD = "llm-ray-few-bits"


def quantize(weight: Tensor, bits: FewBits) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as integers and scales (bf16): int8 [out, in] and [out, 1]; int4 packed by two, int8 [blocks / 2,
    32], and [blocks, 1]."""
    if bits == "int8":
        scale = _scales(weight.float().abs().amax(1, keepdim=True) / 127)
        return (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale
    blocks = F.pad(weight.flatten().float(), (0, -weight.numel() % (2 * BLOCK))).view(-1, BLOCK)
    scale = _scales(blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8)
    integers = (blocks / scale.float()).round_().clamp_(-8, 7).to(torch.int8)
    low, high = integers.chunk(
        2
    )  # a byte has one of each half of the matrix: neighbours would have to be woven together
    return (low & 15) | (high << 4), scale


def _scales(wanted: Tensor) -> Tensor:
    return torch.where(wanted == 0, 1.0, wanted).to(torch.bfloat16)


def dequantize(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of :func:`quantize`, of `shape`, in `dtype`."""
    if len(packed) == len(scale):
        return packed.to(dtype).mul_(scale)
    blocks = torch.empty(2, *packed.shape, dtype=dtype)
    # As the upper half of a byte an integer is 16 times itself, sign included.
    torch.mul(packed << 4, (scale[: len(packed)] / 16).to(dtype), out=blocks[0])
    torch.mul(packed & -16, (scale[len(packed) :] / 16).to(dtype), out=blocks[1])
    return blocks.flatten()[: shape.numel()].view(shape)


class FewBitsLinear(nn.Linear):
    """A linear layer whose weight [out, in] is packed; it takes gradients to its input, and has none of its own."""

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
        """The weight as it multiplies, unpacked for this call."""
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
    """x Wᵀ, of which only the packed W is kept for the backward pass."""

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
    """An ordinary layer of one in few bits, with the weights that it multiplies by."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.unpacked(dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear


def quantizable(model: PreTrainedModel, keep: tuple[str, ...] = ()) -> list[str]:
    """Names of the linear layers that go into few bits: all but the output head, which may share its weights with the
    embeddings, and those called as in `keep`."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and not any(f".{name}".endswith(f".{kept}") or f".{kept}." in f".{name}." for kept in keep)
    ]


def check_few_bits(empty: PreTrainedModel, name: object, bits: FewBits, keep: tuple[str, ...] = ()) -> int:
    """How many weights are packed of a model, of which `empty` has none in memory. Raises ModelError where few bits would
    not make it small."""
    key = f"model.weights is {bits}, but the model {name}"
    if getattr(empty.config, "quantization_config", None):
        raise ModelError(f"{key} keeps its weights quantized already: use the model that it was quantized from")
    names = quantizable(empty, keep)
    packed = sum(cast(nn.Linear, empty.get_submodule(name)).weight.numel() for name in names)
    layers = sum(weight.numel() for weight in empty.parameters()) - sum(
        weight.numel() for end in (empty.get_input_embeddings(), empty.get_output_embeddings()) if end is not None
        for weight in end.parameters()
    )  # fmt: skip
    if packed < layers / 2:
        raise ModelError(
            f"{key} keeps most of its weights outside linear layers (such as in a mixture's experts, or in GPT-2's "
            "Conv1D), where they cannot be packed: remove model.weights"
        )
    return packed


@register_quantization_config(_METHOD)
class FewBitsConfig(QuantizationConfigMixin):
    """What `from_pretrained` is told."""

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
        """Put layers with the read weights in their places; nothing is left for transformers to put anywhere."""
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            linear = cast(nn.Linear, model.get_submodule(name))
            layer = FewBitsLinear(linear, value[0] if isinstance(value, list) else value, self.bits)
            layer._is_hf_initialized = True
            model.set_submodule(name, layer)
            missing_keys.discard(key)
        return {}
