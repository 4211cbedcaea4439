"""On the real model, packed, padded and single rows have the same loss and gradients, and rows do not affect each
other."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from llm_ray.data.encode import IGNORED
from llm_ray.train.attention import NAME, use_packed_attention
from llm_ray.train.batches import Batch, collate
from llm_ray.train.loss import SupervisedLoss

ROWS = [[5, 80, 300, 7, 900, 12, 44], [9, 10, 1000, 3], [17, 23, 42, 99, 1, 4, 6, 8, 300, 20, 21]]
LABELS = [[IGNORED, IGNORED, *row[2:]] for row in ROWS]


def sequences(rows: list[list[int]], labels: list[list[int]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})


def every(rows: datasets.Dataset, *, packed: bool) -> Batch:
    return collate(rows, list(range(len(rows))), packed)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert use_packed_attention(loaded)
    return loaded.eval()


def single_losses(model: PreTrainedModel) -> float:
    """transformers' own loss, row by row."""
    total = 0.0
    for row, labels in zip(ROWS, LABELS, strict=True):
        count = sum(label != IGNORED for label in labels[1:])
        total += count * model(input_ids=torch.tensor([row]), labels=torch.tensor([labels])).loss.item()
    return total


@pytest.mark.parametrize("blockwise", [False, True])
def test_packed_padded_and_single_rows_have_the_same_loss(model: PreTrainedModel, blockwise: bool) -> None:
    data = sequences(ROWS, LABELS)
    with torch.no_grad():
        packed = SupervisedLoss(model, model, packed=True)
        assert packed.choose_blockwise()
        packed.blockwise = blockwise
        loss = packed(every(data, packed=True)).item()
        model.set_attn_implementation("sdpa")
        padded = SupervisedLoss(model, model, packed=False)
        padded.blockwise = blockwise
        assert padded(every(data, packed=False)).item() == pytest.approx(loss, rel=1e-5)
        assert single_losses(model) == pytest.approx(loss, rel=1e-5)
        model.set_attn_implementation(NAME)


def test_a_row_does_not_see_its_neighbours(model: PreTrainedModel) -> None:
    loss = SupervisedLoss(model, model, packed=True)
    supervised_last = [[IGNORED] * len(ROWS[0]), [IGNORED] * len(ROWS[1]), LABELS[2]]
    other_first = [[77] * len(ROWS[0]), *ROWS[1:]]
    with torch.no_grad():
        one = loss(every(sequences(ROWS, supervised_last), packed=True))
        other = loss(every(sequences(other_first, supervised_last), packed=True))
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_gradients_are_the_same_packed_and_padded(smollm2: Path) -> None:
    def gradients(packed: bool) -> dict[str, torch.Tensor]:
        causal = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        if packed:
            use_packed_attention(causal)
        torch.manual_seed(0)
        adapted: nn.Module = get_peft_model(causal, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():  # B starts at zero, and A would have no gradient
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        loss = SupervisedLoss(adapted, causal, packed)
        loss.blockwise = packed
        loss(every(sequences(ROWS, LABELS), packed=packed)).backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    packed, padded = gradients(True), gradients(False)
    assert packed.keys() == padded.keys()
    assert len(packed) == 2 * 7 * 30  # A and B on seven linear layers of thirty blocks
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, padded[name], rtol=2e-3, atol=1e-4)


def test_a_sliding_window_is_kept() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
    )
    model = MistralForCausalLM(config).eval()
    rows = [list(range(1, 20)), list(range(30, 45))]
    data = sequences(rows, rows)
    with torch.no_grad():
        padded = SupervisedLoss(model, model, packed=False)(every(data, packed=False)).item()
        assert use_packed_attention(model)
        packed = SupervisedLoss(model, model, packed=True)(every(data, packed=True)).item()
    assert packed == pytest.approx(padded, rel=1e-5)


def test_a_model_that_changes_its_logits_keeps_its_own_loss() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits * 9)
            return output

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = Scaled(config)
    assert not SupervisedLoss(model, model, packed=False).choose_blockwise()
    plain = LlamaForCausalLM(config)
    assert SupervisedLoss(plain, plain, packed=False).choose_blockwise()
