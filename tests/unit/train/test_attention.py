"""Attention over packed rows is the attention of each row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ray.train.attention import SHORT, packed_attention, set_rows


def tensors(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, 16, dtype=dtype, requires_grad=True) for heads in (6, 2, 2))


@pytest.mark.parametrize("lengths", [[7], [5, 1, 12], [SHORT + 9, 30]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rows_and_their_gradients(lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = tensors(sum(lengths), dtype)
    set_rows(lengths)
    given, _ = packed_attention(nn.Identity(), query, key, value, None, scaling=0.25)
    gradients = torch.autograd.grad(given.float().square().sum(), (query, key, value))

    exact = [t.detach().float().requires_grad_() for t in (query, key, value)]
    rows = [
        F.scaled_dot_product_attention(
            *(t.repeat_interleave(6 // t.shape[1], 1) for t in row), is_causal=True, scale=0.25
        )
        for row in zip(*(t.split(lengths, 2) for t in exact), strict=True)
    ]
    wanted = torch.cat(rows, 2).transpose(1, 2)
    expected = torch.autograd.grad(wanted.square().sum(), exact)

    torch.testing.assert_close(given.float(), wanted, rtol=tolerance, atol=tolerance)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(
            gradient.float(), right, rtol=5 * tolerance, atol=5 * tolerance * float(right.abs().max())
        )
