"""A logits processor of a user's own, which ends vLLM's engine at one token: how an engine dies in the tests of
serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

DEADLY = 49151
"""The token; it stands in no text of the tests."""


class Deadly(LogitsProcessor):
    """Changes nothing, and raises ArithmeticError for a prompt with the token."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None: ...

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update and any(DEADLY in (prompt or ()) for _, _, prompt, _ in batch_update.added):
            raise ArithmeticError("the deadly token")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits
