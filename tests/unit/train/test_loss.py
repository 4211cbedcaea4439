"""The blockwise loss equals the plain one, in value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm_ray.train import loss as loss_module
from llm_ray.train.loss import linear_cross_entropy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_equals_cross_entropy_with_its_gradients(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * 101 * 16)  # several blocks
    torch.manual_seed(0)
    hidden = torch.randn(rows, 12, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(101, 12, requires_grad=True)
    offset = torch.randn(101, requires_grad=True) if bias else None
    target = torch.randint(101, (rows,))
    inputs = [t for t in (hidden, weight, offset) if t is not None]

    expected = F.cross_entropy(F.linear(hidden, weight, offset), target, reduction="sum")
    expected_gradients = torch.autograd.grad(expected * 0.3, inputs)
    given = linear_cross_entropy(hidden, weight, offset, target)
    gradients = torch.autograd.grad(given * 0.3, inputs)

    torch.testing.assert_close(given, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_a_frozen_projection_gets_no_gradient() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    linear_cross_entropy(hidden, weight, None, torch.arange(5)).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bf16_stays_near_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(64, 32), torch.randn(500, 32) / 6, torch.randint(500, (64,))
    exact = linear_cross_entropy(hidden, weight, None, target)
    low = linear_cross_entropy(hidden.bfloat16(), weight, None, target)
    assert abs(low - exact) / exact < 1e-2
