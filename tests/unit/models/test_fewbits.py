"""Layers in few bits: what they keep of their weights, what they compute, and which models have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm_ray.conf.finetune import FewBits, Model
from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.models.fewbits import BYTES, FewBitsLinear, dequantize, quantizable, quantize, widened
from llm_ray.models.load import Base, find_base, load_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_bias": True,
    "initializer_range": 0.3,
}


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """A Llama whose input and output embeddings are the same matrix."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer.json").write_text("{}")
    return find_base(Model(base=str(tmp_path / "tiny")), Paths())


def test_known_weights_come_back() -> None:
    rows = torch.tensor([[127.0, -64.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    packed, scale = quantize(rows, "int8")
    assert packed.tolist() == [[127, -64, 1, 0], [0, 0, 0, 0]]
    assert torch.equal(dequantize(packed, scale, rows.shape, torch.float32), rows)
    # Of each block the weight farthest from 0 is -8 times the scale, of either sign.
    blocks = torch.cat([torch.arange(-8.0, 8.0).repeat(2), torch.arange(8.0, -8.0, -1.0).repeat(2) / 4]).view(4, 16)
    packed, scale = quantize(blocks, "int4")
    assert scale.flatten().tolist() == [1.0, -0.25]
    assert torch.equal(dequantize(packed, scale, blocks.shape, torch.float32), blocks)


@pytest.mark.parametrize("shape", [(64, 96), (5, 7), (3, 64), (130, 33)], ids=str)
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_no_weight_is_further_off_than_its_scale_allows(shape: tuple[int, int], bits: FewBits) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]
    packed, scale = quantize(weight, bits)
    given = dequantize(packed, scale, weight.shape, torch.float32)
    steps = scale.float().abs()
    if bits == "int4":
        steps = steps.expand(-1, 32).flatten()[: weight.numel()].view(shape)
        bound = 1.05  # -8 to 7: what would be 8 becomes 7
    else:
        bound = 0.8  # bf16 rounds a scale by 1/256: of 127, half
    assert ((given - weight).abs() <= steps * bound).all()
    assert (given - weight).norm() / weight.norm() < {"int8": 0.012, "int4": 0.11}[bits]
    narrow = dequantize(packed, scale, weight.shape, torch.bfloat16)
    assert torch.equal(narrow, given.bfloat16()), "bf16 rounds once"
    if weight.numel() % 64 == 0:
        kept = packed.nbytes + scale.nbytes - (2 * shape[0] if bits == "int8" else 0)
        assert kept == BYTES[bits] * weight.numel()


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_outputs_and_gradients_are_those_of_a_dense_layer(bits: FewBits, autocast: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 40)
    layer = FewBitsLinear(linear, linear.weight.detach(), bits)
    dense = widened(layer, torch.float32)
    inputs = [torch.randn(3, 5, 48).requires_grad_(), torch.empty(0)]
    inputs[1] = inputs[0].detach().clone().requires_grad_()
    wanted, kept = torch.randn(3, 5, 40), []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        given = layer(inputs[0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = dense(inputs[1])
    assert given.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(given, expected, **tolerance)
    assert {t.data_ptr() for t in kept} <= {layer.packed.data_ptr(), layer.scale.data_ptr()}, "nothing else is kept"
    for output in (given, expected):
        output.backward(wanted.to(output.dtype))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_model_is_packed_while_it_is_read(base: Base, bits: FewBits) -> None:
    whole, packed = load_model(base, torch.float32), load_model(base, torch.float32, bits)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, FewBitsLinear)}
    assert set(layers) == set(quantizable(whole)) and len(layers) == 2 * 7
    for name, layer in layers.items():
        weight, bias = whole.get_submodule(name).weight, whole.get_submodule(name).bias
        expected = dequantize(*quantize(weight.detach(), bits), weight.shape, torch.float32)
        assert torch.equal(layer.weight, expected)
        assert (layer.bias is None) == (bias is None) and (bias is None or torch.equal(layer.bias, bias))
    assert packed.lm_head.weight is packed.model.embed_tokens.weight, "tied, as they are"
    assert torch.equal(packed.lm_head.weight, whole.lm_head.weight)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        apart = (packed(input_ids=ids).logits - whole(input_ids=ids).logits).norm() / whole(input_ids=ids).logits.norm()
    assert 0 < apart < {"int8": 0.05, "int4": 0.6}[bits]
    assert not getattr(packed.config, "quantization_config", None)


def test_layers_to_be_trained_whole_are_kept_whole(base: Base) -> None:
    packed = load_model(base, torch.float32, "int8", ("down_proj", "layers.1.self_attn"))
    names = {n for n, layer in packed.named_modules() if isinstance(layer, FewBitsLinear)}
    assert not any("down_proj" in name or "layers.1.self_attn" in name for name in names)
    assert "model.layers.0.self_attn.q_proj" in names


def test_models_that_few_bits_would_not_make_small_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"model.weights is int4, but the model .*gpt2 keeps most of its weights outside"
    ):
        load_model(find_base(Model(base=str(tmp_path / "gpt2")), Paths()), torch.float32, "int4")


def test_a_model_that_is_quantized_already_is_refused(base: Base, tmp_path: Path) -> None:
    import json

    config = tmp_path / "tiny" / "config.json"
    settings = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="is quantized already"):
        load_model(base, torch.float32, "int8")
