"""Models that cap their logits, or whose rows would affect each other when packed, are trained with their own loss."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm_ray.errors import ModelError
from llm_ray.train.attention import packed_attention, set_rows, switch_to_packed, use_packed_attention, why_not_packed
from llm_ray.train.batches import collate
from llm_ray.train.loss import SupervisedLoss
from tests.full.architectures import small

ROWS = [
    [(7 * i + 3) % 90 for i in range(31)],
    [(5 * i + 11) % 90 for i in range(9)],
    [(3 * i + 1) % 90 for i in range(17)],
]
DATA = datasets.Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})


def losses(model: PreTrainedModel, packed: bool) -> tuple[float, float]:
    """Returns transformers' loss, row by row, and the loss of training."""
    with torch.no_grad():
        own = sum(
            model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.item() * (len(row) - 1)
            for row in ROWS
        )
        module = SupervisedLoss(model, model, packed)
        module.choose_blockwise()
        return own, module(collate(DATA, [0, 1, 2], packed)).item()


@pytest.mark.parametrize("kind", ["gemma2", "vaultgemma", "nanochat", "recurrent_gemma", "llama"])
@pytest.mark.parametrize("grown", [1, 12])
def test_logits_that_grow(kind: str, grown: int) -> None:
    """A cap affects only large logits."""
    model = small(kind, initializer_range=0.02)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight * 0.01)
    module = SupervisedLoss(model, model, packed=False)
    assert module.choose_blockwise() == (kind == "llama")
    with torch.no_grad():
        head.weight *= 100 * grown
        given = module(collate(DATA, [0, 1, 2], packed=False)).item()
    assert given == pytest.approx(losses(model, packed=False)[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["granite", "cohere", "minicpm3", "gemma3n_text"])
def test_logits_that_are_scaled_or_capped(kind: str) -> None:
    settings = {"granite": {"logits_scaling": 8.0}, "minicpm3": {"dim_model_base": 16}}.get(kind, {})
    own, given = losses(small(kind, **settings), packed=False)
    assert given == pytest.approx(own, rel=1e-4)


def test_a_head_that_is_not_given_the_hidden_states() -> None:
    """Mllama's base_model is the whole model: it returns logits first."""
    model = small("mllama")
    assert not SupervisedLoss(model, model, packed=False).choose_blockwise()


def test_choosing_leaves_the_mode() -> None:
    """Otherwise dropout would be active in evaluation."""
    model = small("gpt2")
    SupervisedLoss(model, model, packed=False).choose_blockwise()
    why_not_packed(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["doge", "recurrent_gemma", "gemma2", "gpt_oss", "lfm2", "mamba", "roberta"])
def test_rows_that_cannot_be_packed(kind: str) -> None:
    model = small(kind)
    before = model.config._attn_implementation
    assert why_not_packed(model)
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == before
    own, given = losses(model, packed=False)
    assert given == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma3_text", "jetmoe", "deepseek_v3"])
def test_rows_that_can(kind: str) -> None:
    model = small(kind)
    assert why_not_packed(model) == ""
    own, _ = losses(model, packed=False)
    switch_to_packed(model)
    with torch.no_grad():
        packed = SupervisedLoss(model, model, packed=True)(collate(DATA, [0, 1, 2], packed=True)).item()
    assert packed == pytest.approx(own, rel=1e-4)


class Mixing(LlamaForCausalLM):
    """Shifts hidden states along the sequence by one token, like a convolution, without a trace in its configuration."""

    def forward(self, input_ids: Tensor, **inputs: object) -> object:
        embedded = self.get_input_embeddings()(input_ids)
        before = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + 0.05 * before, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_configuration_does_not_tell(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    assert "neighbours" in why_not_packed(Mixing(config).to(dtype))
    assert why_not_packed(LlamaForCausalLM(config).to(dtype)) == ""


@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_decides_nothing(autocast: bool) -> None:
    """With large weights, the results of a bf16 model depend on the order of additions. It can be packed all the same, and
    its weights stay unchanged."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        initializer_range=1.0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert why_not_packed(model) == ""
        assert "neighbours" in why_not_packed(Mixing(config).to(torch.bfloat16))
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "mask or bias"),
        ({"is_causal": False}, "is not causal"),
    ],
)
def test_attention_that_is_not_computed_here(more: dict[str, object], words: str) -> None:
    set_rows([4])
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=words):
        packed_attention(nn.Identity(), q, q, q, **{"attention_mask": None} | more)


def test_a_model_that_cannot_be_called() -> None:
    model = small("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(3, 64)
    with pytest.raises(ModelError, match="cannot compute a row of tokens"):
        why_not_packed(model)
