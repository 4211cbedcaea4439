"""What is drawn, against vLLM's own sampler in torch."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from llm_ray.serve.engines.sampling import _at, _draw, _likeliest

VOCABULARY = 3000


def logits(rows: int, spread: float) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread


@pytest.mark.parametrize(
    "spread", [0.1, 3.0], ids=["flat, so that more than the first thousand tokens are needed", "steep"]
)
@pytest.mark.parametrize(
    ("k", "p"), [(5, 1.0), (1, 1.0), (VOCABULARY, 0.5), (VOCABULARY, 0.95), (40, 0.8), (2000, 0.9), (VOCABULARY, 1e-6)]
)
def test_the_tokens_left_are_those_that_vllm_leaves(spread: float, k: int, p: float) -> None:
    raw = logits(4, spread)
    expected = apply_top_k_top_p_pytorch(raw.clone(), torch.full((4,), k), torch.full((4,), p)).softmax(-1)
    kept, tokens = _likeliest(raw.softmax(-1), torch.full((4, 1), k), torch.full((4, 1), p))
    found = torch.zeros(4, VOCABULARY).scatter_(1, tokens, kept)
    differing = ((found > 0) != (expected > 0)).sum(-1)
    assert (differing <= 1).all(), "the last token by rounding"
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected, atol=2e-3, rtol=0)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([[0.5, 0.0, 0.2, 0.3, 0.0]])
    numbers = torch.linspace(0, 1 - 2**-24, 1000)
    drawn = _at(probabilities.expand(1000, 5), numbers)
    assert drawn.bincount(minlength=5).tolist() == pytest.approx([500, 0, 200, 300, 0], abs=1)


def test_a_row_draws_the_same_in_any_company() -> None:
    raw = torch.cat([logits(3, 3.0), logits(1, 0.1)])
    k, p = torch.tensor([VOCABULARY, 40, VOCABULARY, VOCABULARY]), torch.tensor([1.0, 1.0, 0.9, 0.99])

    def seeds(*rows: int) -> dict[int, torch.Generator]:
        return {i: torch.Generator().manual_seed(row) for i, row in enumerate(rows)}

    together = _draw(raw, seeds(0, 1, 2, 3), k, p)[0].tolist()
    for row in range(4):
        plain = int(k[row]) == VOCABULARY and float(p[row]) == 1
        limits = (None, None) if plain else (k[row : row + 1], p[row : row + 1])
        assert _draw(raw[row : row + 1], seeds(row), *limits)[0].tolist() == [together[row]]
