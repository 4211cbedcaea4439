"""Fast adapters compute what peft's do, and learning moves every weight that is to learn and no other."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_ray.conf.schema import Lora
from llm_ray.errors import ConfError
from llm_ray.train.model import add_adapters, speed_up_adapters

IDS = torch.arange(24).reshape(2, 12)


def adapted(lora: Lora) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = add_adapters(LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("lora", [Lora(r=4), Lora(r=4, alpha=3, rslora=True), Lora(r=2, target_modules=("q_proj", "down_proj"))])
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
    with pytest.raises(ConfError, match=r"tuning\.lora\.target_modules.*query_key_value.*its linear layers are.*q_proj"):
        adapted(Lora(target_modules=("query_key_value",)))
