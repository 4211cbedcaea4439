"""Fast adapters compute the same as peft's, and training changes all trainable weights and no others."""

from __future__ import annotations

import copy
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from llm_ray.conf.finetune import FewBits, Lora
from llm_ray.errors import ConfError
from llm_ray.export.stage import save_adapter
from llm_ray.models.fewbits import FewBitsLinear, quantizable, widened
from llm_ray.train import adapters
from llm_ray.train.adapters import _Shared, dropped, speed_up_adapters
from llm_ray.train.model import add_adapters, learning_modules

IDS = torch.arange(24).reshape(2, 12)


def adapted(lora: Lora) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    model = add_adapters(LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=4),
        Lora(r=4, alpha=3, rslora=True),
        Lora(r=2, target_modules=("q_proj", "down_proj")),
        Lora(r=4, rank_pattern={"q_proj": 2, r"layers\.1\..*up_proj": 8}, alpha_pattern={"v_proj": 5}),
        Lora(r=4, dora=True),
        Lora(r=4, dora=True, rslora=True, rank_pattern={"o_proj": 2}),
    ],
    ids=str,
)
def test_fast_adapters_give_the_logits_and_gradients_of_pefts(lora: Lora) -> None:
    plain, fast = adapted(lora), adapted(lora)
    speed_up_adapters(fast)
    outputs = [model(input_ids=IDS, labels=IDS) for model in (plain, fast)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (plain, fast)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize(
    "lora",
    [Lora(r=4), Lora(r=4, alpha=3, rslora=True), Lora(r=2, target_modules=("q_proj",)), Lora(r=4, dora=True)],
    ids=str,
)
def test_adapters_on_few_bits_give_the_logits_and_gradients_of_pefts_on_the_same_weights(
    lora: Lora, bits: FewBits
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    packed = LlamaForCausalLM(config)
    for name in quantizable(packed):
        linear = packed.get_submodule(name)
        packed.set_submodule(name, FewBitsLinear(linear, linear.weight.detach(), bits))
    dense = copy.deepcopy(packed)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, FewBitsLinear):
            dense.set_submodule(name, widened(layer, torch.float32))
    packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    models = []
    for causal in (dense, packed):
        torch.manual_seed(1)
        model = add_adapters(causal, lora)
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            nn.init.normal_(parameter, std=0.1)
        models.append(model.train())
    speed_up_adapters(models[1])
    assert [n for n, p in models[1].named_parameters() if p.requires_grad] == [
        n for n, p in models[0].named_parameters() if p.requires_grad
    ]
    outputs = [model(input_ids=IDS, labels=IDS) for model in models]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for name, given in models[1].named_parameters():
        if given.requires_grad:
            wanted = models[0].get_parameter(name).grad
            assert wanted is not None and wanted.abs().sum() > 0
            torch.testing.assert_close(given.grad, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_fresh_dora_is_the_model_itself(bf16: bool) -> None:
    """peft's row norms in bf16 are off by 0.2 %; and magnitudes must be trained in fp32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    causal = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.bfloat16 if bf16 else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
        before = causal(input_ids=IDS).logits
        model = add_adapters(causal, Lora(r=4, dora=True))
        speed_up_adapters(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=0.02 if bf16 else 1e-5)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight.double().norm(dim=1)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.dtype == torch.float32
    torch.testing.assert_close(magnitude.double(), exact, rtol=1e-6, atol=0)


def test_ranks_by_pattern_keep_the_scale_unless_alpha_is_set() -> None:
    def scales(lora: Lora) -> dict[str, tuple[int, float]]:
        layers = adapted(lora).get_submodule("base_model.model.model.layers.0.self_attn")
        return {
            name: (getattr(layers, name).r["default"], getattr(layers, name).scaling["default"])
            for name in ("q_proj", "k_proj", "v_proj")
        }

    pattern = {"q_proj": 8, r"layers\.0\..*k_proj": 2}
    assert scales(Lora(r=4, rank_pattern=pattern)) == {"q_proj": (8, 2.0), "k_proj": (2, 2.0), "v_proj": (4, 2.0)}
    assert scales(Lora(r=4, alpha=4, rank_pattern=pattern, alpha_pattern={"v_proj": 12})) == {
        "q_proj": (8, 0.5),
        "k_proj": (2, 2.0),
        "v_proj": (4, 3.0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_its_share_and_the_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.ones(3, 501, 333, dtype=dtype, requires_grad=True)
    given = dropped(x, 0.1)
    share = (given == 0).float().mean(0)
    assert share.mean().item() == pytest.approx(0.1, abs=0.002)
    assert share.std().item() == pytest.approx(math.sqrt(0.1 * 0.9 / 3), abs=0.005), "each value by itself"
    assert set(given.detach().unique().tolist()) == {0.0, torch.tensor(1 / 0.9, dtype=dtype).item()}
    given.sum().backward()
    assert torch.equal(x.grad, given.detach())
    torch.manual_seed(3)
    assert torch.equal(dropped(x, 0.1), given), "a run that goes on draws what the unbroken one draws"


def test_layers_of_one_input_drop_the_same_values_and_nothing_is_kept_longer_than_it() -> None:
    shared, x = _Shared(), torch.randn(7, 33)
    given, kept = shared.copies_of(x, torch.bfloat16, 0.5)
    assert given.dtype == kept.dtype == torch.bfloat16
    assert 0.3 < (kept == 0).float().mean() < 0.7
    assert shared.copies_of(x, torch.bfloat16, 0.5)[1] is kept
    with torch.no_grad():
        assert shared.copies_of(x, torch.bfloat16, 0.5)[1] is not kept, "it would have no gradient"
    again = shared.copies_of(x, torch.bfloat16, 0.5)[1]
    x.mul_(2)
    assert not torch.equal(shared.copies_of(x, torch.bfloat16, 0.5)[1], again), "it is another input"
    assert shared.copies_of(x, torch.float32, 0.0)[1] is x
    assert not torch.equal(*(shared.copies_of(torch.ones(7, 33), torch.float32, 0.5)[1] for _ in range(2)))
    last = weakref.ref(shared.copies_of(x, torch.float32, 0.5)[1])
    assert last() is not None
    del x
    assert last() is None


def test_queries_keys_and_values_drop_alike_and_layers_apart_do_not() -> None:
    model = adapted(Lora(r=4, dropout=0.5)).train()
    speed_up_adapters(model)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda layer, inputs, output, name=name: seen.update({name: inputs[0]}))
    drawn = 0

    def count(*arguments: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return dropped(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "dropped", count)
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert drawn == 2 * 4, "for q, k and v; o; gate and up; down: of two layers"
    assert len({id(value) for value in seen.values()}) == drawn


def test_dropout_in_training_alone() -> None:
    model = adapted(Lora(r=4, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    speed_up_adapters(model)
    first, second = (model.train()(input_ids=IDS).logits for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(input_ids=IDS).logits for _ in range(2))
    assert torch.equal(first, second)


def test_every_learning_weight_moves_and_no_other() -> None:
    model = adapted(Lora(r=4, modules_to_save=("lm_head",)))
    speed_up_adapters(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name)


def test_fast_adapters_are_saved_and_merged_as_pefts() -> None:
    model = adapted(Lora(r=4))
    speed_up_adapters(model)
    assert isinstance(model, PeftModel)
    logits = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_there_are_told_with_those_that_are() -> None:
    with pytest.raises(
        ConfError, match=r"tuning\.lora\.target_modules.*query_key_value.*its linear layers are.*q_proj"
    ):
        adapted(Lora(target_modules=("query_key_value",)))


def test_a_name_as_text_is_a_name_and_a_pattern_a_pattern() -> None:
    """peft treats any string as a pattern, and q_proj matches nothing."""
    assert learning_modules(adapted(Lora(r=4, target_modules="q_proj"))) == [
        "model.layers.*.self_attn.q_proj: rank 4, 2 of them, 512 parameters",
        "frozen: model.embed_tokens, model.layers.*.self_attn.k_proj, model.layers.*.self_attn.v_proj, "
        "model.layers.*.self_attn.o_proj, model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj, "
        "model.layers.*.mlp.down_proj, lm_head",
    ]
    some = learning_modules(adapted(Lora(r=4, target_modules=r".*\.1\..*\.[qv]_proj", modules_to_save=("lm_head",))))
    assert some[:-1] == [
        "model.layers.*.self_attn.q_proj: rank 4, 1 of them, 256 parameters",
        "model.layers.*.self_attn.v_proj: rank 4, 1 of them, 192 parameters",
        "lm_head: trained whole, 1 of them, 2,048 parameters",
    ]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(target_modules="q_proy"), r"target_modules: 'q_proy' is not a layer of this model: do you mean q_proj\?"),
        (Lora(target_modules=("q_proj", "v_porj")), r"target_modules: 'v_porj' .*do you mean v_proj\?"),
        (
            Lora(target_modules=r".*query.*"),
            r"target_modules: the pattern '\.\*query\.\*' matches no layer's full name, such as model\.layers\.0",
        ),
        (
            Lora(target_modules="q_proj|v_proj"),
            r"target_modules: the pattern 'q_proj\|v_proj' matches no layer's full name",
        ),
        (Lora(target_modules="(q_proj"), r"target_modules: '\(q_proj' does not match this model"),
        (
            Lora(target_modules=("self_attn",)),
            r"target_modules: \('self_attn',\) does not match this model.*peft reports",
        ),
        (
            Lora(rank_pattern={"q_prj": 4}),
            "rank_pattern: no layer with an adapter matches 'q_prj': do you mean q_proj?",
        ),
        (
            Lora(alpha_pattern={"lm_head": 4}),
            "alpha_pattern: no layer with an adapter matches 'lm_head'; these have one: down_proj, gate_proj",
        ),
        (Lora(modules_to_save=("embed_tokenz",)), r"modules_to_save: 'embed_tokenz' .*do you mean embed_tokens\?"),
    ],
    ids=str,
)
def test_a_name_that_is_no_layer_is_told_with_the_nearest(lora: Lora, message: str) -> None:
    with pytest.raises(ConfError, match=rf"tuning\.lora\.{message}"):
        adapted(lora)


def mixture(lora: Lora) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return add_adapters(MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)), lora)


def test_of_a_mixture_all_linear_is_attention_and_experts_without_the_router(tmp_path: Path) -> None:
    model = mixture(Lora(r=4))
    assert sorted(learning_modules(model)) == [
        "frozen: model.embed_tokens, model.layers.*.mlp.gate, lm_head",
        "model.layers.*.mlp.experts.down_proj: rank 4, 2 of them, 2,560 parameters",
        "model.layers.*.mlp.experts.gate_up_proj: rank 8, 2 of them, 8,192 parameters",
        *(
            f"model.layers.*.self_attn.{name}_proj: rank 4, 2 of them, {count} parameters"
            for name, count in (("k", 384), ("o", 512), ("q", 512), ("v", 384))
        ),
    ]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    speed_up_adapters(model)
    logits = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path)  # read back by peft unchanged
    again = PeftModel.from_pretrained(type(model.get_base_model())(model.config), tmp_path)
    missing = again.load_state_dict(model.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], [])
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_routers_that_are_linear_layers_stay_as_they_are() -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = add_adapters(Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts, num_key_value_heads=2)), Lora(r=4))
    *lines, resting = learning_modules(model)
    assert any("mlp.shared_expert.gate_proj: rank 4" in line for line in lines)
    assert not any("gate:" in line for line in lines)
    assert resting.endswith(
        "model.layers.*.mlp.gate, model.layers.*.mlp.experts, model.layers.*.mlp.shared_expert_gate, lm_head"
    )


@pytest.mark.parametrize("whole", [("lm_head",), ("embed_tokens", "lm_head")])
def test_a_saved_adapter_holds_what_learned_and_no_copies(whole: tuple[str, ...], tmp_path: Path) -> None:
    model = adapted(Lora(r=4, target_modules=("q_proj",), modules_to_save=whole))
    assert isinstance(model, PeftModel)
    save_adapter(model, tmp_path, "org/base")
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as tensors:
        others = {name.removeprefix("base_model.model.") for name in tensors.keys() if "lora_" not in name}  # noqa: SIM118
    assert others == ({"lm_head.weight", "model.embed_tokens.weight"} if whole[1:] else {"lm_head.weight"})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_dropout_and_dora_on_experts_are_refused_by_name_and_dropout_goes_with_attention() -> None:
    with pytest.raises(
        ConfError,
        match=r"tuning\.lora\.dropout is 0\.1, but peft has no dropout for adapters on experts \(down_proj, gate_up_proj\)",
    ):
        mixture(Lora(r=4, dropout=0.1))
    with pytest.raises(ConfError, match=r"tuning\.lora\.dora: peft has no DoRA for adapters on experts"):
        mixture(Lora(r=4, dora=True))
    mixture(Lora(r=4, dropout=0.1, target_modules=("q_proj",)))
