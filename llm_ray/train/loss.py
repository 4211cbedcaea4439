"""The loss of a causal language model over supervised tokens, without a [tokens, vocabulary] matrix in memory.

The vocabulary of a small model is large compared to its width: logits, their softmax and its gradient cost more memory
traffic than the layers. Here only the hidden states of supervised tokens are projected, a block of rows at a time, and
each block's gradient is computed right away, while the block is in the cache (the idea of Liger Kernel's
FusedLinearCrossEntropy, arXiv:2410.10989, and of Wijmans et al. 2024, arXiv:2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_ray.train.attention import set_rows
from llm_ray.train.batches import Batch
from llm_ray.train.objectives import CrossEntropy, Objective

LARGE = 1e4
"""Largest absolute value of the logits with which a model is tested for a cap."""
BLOCK_BYTES = 24 * 2**20  # of a block's fp32 logits: about a core's share of the last-level cache


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `hidden @ weight.T + bias`. hidden [n, d]; weight [v, d]; bias [v] or None; target
    [n]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight, bias)
        projection = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32)
        for part in _blocks(hidden, weight):
            t = target[part, None]
            logits = _logits(hidden[part], projection, bias)
            norm = logits.logsumexp(1, keepdim=True)
            loss += (norm - logits.gather(1, t)).sum()
            if gradients.hidden is not None or gradients.weight is not None:
                gradients.add(part, _slope(logits, norm, t), hidden, projection)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad_loss.float()
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale).to(ctx.dtypes[1]),
            None if grad_bias is None else grad_bias.mul_(scale).to(ctx.dtypes[1]),
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Summed cross entropy (fp32 scalar) of the projection of hidden [n, d] by weight [v, d] against target [n]."""
    return _LinearCrossEntropy.apply(hidden, weight, bias, target)


class _LinearLogProbabilities(torch.autograd.Function):
    """Log-probability of each target under `hidden @ weight.T + bias`: fp32 [n]. Shapes as above."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        learn_hidden, *learn_head = ctx.needs_input_grad[:3]
        # The gradient that arrives at each token is known only in the backward pass. If the projection is frozen, the
        # gradient with respect to a token's hidden state can still be computed here, and scaled there.
        at_once = learn_hidden and not any(learn_head)
        grad_hidden = torch.empty_like(hidden) if at_once else None
        given, norms = torch.empty(len(hidden)), torch.empty(len(hidden))
        projection = weight.to(hidden.dtype)
        for part in _blocks(hidden, weight):
            t = target[part, None]
            logits = _logits(hidden[part], projection, bias)
            norm = logits.logsumexp(1, keepdim=True)
            given[part], norms[part] = (logits.gather(1, t) - norm)[:, 0], norm[:, 0]
            if grad_hidden is not None:
                torch.mm(_slope(logits, norm, t).to(hidden.dtype), projection, out=grad_hidden[part])
        ctx.save_for_backward(grad_hidden, *(() if at_once else (hidden, weight, bias, target, norms)))
        return given

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *saved = ctx.saved_tensors
        if grad_hidden is not None:
            return grad_hidden * -grad[:, None].to(grad_hidden.dtype), None, None, None
        hidden, weight, bias, target, norms = saved
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight, bias)
        projection = weight.to(hidden.dtype)
        for part in _blocks(hidden, weight):
            slope = _slope(_logits(hidden[part], projection, bias), norms[part, None], target[part, None])
            gradients.add(part, slope.mul_(-grad[part, None]), hidden, projection)
        return (
            gradients.hidden,
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
            None,
        )


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    block = max(16, BLOCK_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + block) for start in range(0, hidden.shape[0], block)]


def _logits(hidden: Tensor, projection: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, projection, bias if bias is None else bias.to(hidden.dtype)).float()


def _slope(logits: Tensor, norm: Tensor, target: Tensor) -> Tensor:
    """The gradient of each target's cross entropy with respect to the logits; overwrites these."""
    return logits.sub_(norm).exp_().scatter_add_(1, target, torch.full_like(norm, -1.0))


class _Gradients:
    """Gradients with respect to hidden states, projection and bias, if they require one, accumulated block by block."""

    def __init__(self, learn: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """`learn`: autograd's needs_input_grad of these three, in this order."""
        self.hidden = torch.empty_like(hidden) if learn[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if learn[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and learn[2] else None

    def add(self, part: slice, slope: Tensor, hidden: Tensor, projection: Tensor) -> None:
        """Adds those of the block `part`, whose logits have the gradient `slope` [block, v]."""
        low = slope.to(hidden.dtype)
        if self.hidden is not None:
            torch.mm(low, projection, out=self.hidden[part])
        if self.weight is not None:
            self.weight += (low.T @ hidden[part]).float()
        if self.bias is not None:
            self.bias += slope.sum(0)


def linear_log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Log-probability, in nats, of each target [n] under the projection of hidden [n, d] by weight [v, d]: fp32 [n]."""
    return _LinearLogProbabilities.apply(hidden, weight, bias, target)


class SupervisedLoss(nn.Module):
    """A causal model and its loss as one module, so that DDP and FSDP wrap both. `forward(batch)` returns the sums of
    `objective` (default: cross entropy).

    `model` is a transformers causal model or a peft model around one; with `packed` it uses the attention of
    ``llm_ray.train.attention``.
    """

    def __init__(
        self, model: nn.Module, causal: PreTrainedModel, packed: bool, objective: Objective | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.objective = objective or CrossEntropy()
        self.blockwise = False
        self._causal = [causal]  # in a list, or every weight would be registered under two names

    def forward(self, batch: Batch, log_probabilities: bool = False) -> Tensor:
        """Returns the objective's figures, each summed over the batch: fp32 [figures], the loss first; or, since DDP and
        FSDP only wrap forward, the result of :meth:`log_probabilities`."""
        return self.log_probabilities(batch) if log_probabilities else self.objective.sums(self, batch)

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Returns the log-probabilities of a batch's rows, in nats, summed over the supervised tokens of each: fp32
        [rows]."""
        of_tokens = self._blockwise_log_probabilities if self.blockwise else self._plain_log_probabilities
        return torch.zeros(len(batch.row_lengths)).index_add(0, batch.row_of, of_tokens(batch))

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Returns the cross entropy summed over the supervised tokens, in nats: fp32 scalar."""
        return self._blockwise_loss(batch) if self.blockwise else self._plain_loss(batch)

    @property
    def causal(self) -> PreTrainedModel:
        """The wrapped transformers model."""
        return self._causal[0]

    def choose_blockwise(self) -> bool:
        """Switches to the blockwise loss if it equals the model's own: the logits must be the unchanged hidden states
        projected by the output embeddings. Returns whether it did.

        Models that scale, cap or shift hidden states or logits keep their own loss. A cap has no effect on the small
        logits of an untrained model, but logits grow in training, so the projection's output is replaced by large ones
        for the test.
        """
        self.blockwise = False
        head = self.causal.get_output_embeddings()
        if type(head) is not nn.Linear:
            return False
        calls: list[tuple[Tensor, Tensor]] = []

        def enlarge(_: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            large = torch.linspace(-LARGE, LARGE, logits.numel()).to(logits.dtype).view(logits.shape)
            calls.append((inputs[0], large))
            return large

        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            hidden = self.causal.base_model(**self._inputs(self._probe))[0]
            with head.register_forward_hook(enlarge):
                logits = self.model(**self._inputs(self._probe)).logits
            if len(calls) == 1 and calls[0][0].shape == hidden.shape and calls[0][1].shape == logits.shape:
                projected, large = calls[0]
                as_it_is = torch.allclose(
                    projected.float(), hidden.float(), rtol=1e-3, atol=1e-3 * float(hidden.abs().max())
                )
                self.blockwise = (
                    as_it_is
                    and torch.equal(logits, large)
                    and bool(torch.isclose(self._plain_loss(self._probe), self._blockwise_loss(self._probe), rtol=1e-2))
                )
        self.model.train(training)
        return self.blockwise

    @property
    def _probe(self) -> Batch:
        """A batch of one short row."""
        ids = torch.arange(1, 17) % self.causal.config.get_text_config().vocab_size
        return Batch(ids[None], torch.arange(16)[None], torch.ones_like(ids)[None], [16], torch.arange(15), ids[1:], 16)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if self.packed:
            set_rows(batch.row_lengths)
            return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}

    def _plain_loss(self, batch: Batch) -> Tensor:
        logits = self.model(**self._inputs(batch)).logits
        logits = logits.flatten(0, 1)[batch.supervised].float()
        return F.cross_entropy(logits, batch.targets, reduction="sum")

    def _plain_log_probabilities(self, batch: Batch) -> Tensor:
        logits = self.model(**self._inputs(batch)).logits
        logits = logits.flatten(0, 1)[batch.supervised].float()
        return -F.cross_entropy(logits, batch.targets, reduction="none")

    def _blockwise_log_probabilities(self, batch: Batch) -> Tensor:
        hidden, head = self._hidden(batch)
        with torch.autocast("cpu", enabled=False):
            return linear_log_probabilities(hidden, head.weight, head.bias, batch.targets)

    def _blockwise_loss(self, batch: Batch) -> Tensor:
        hidden, head = self._hidden(batch)
        with torch.autocast("cpu", enabled=False):
            return linear_cross_entropy(hidden, head.weight, head.bias, batch.targets)

    def _hidden(self, batch: Batch) -> tuple[Tensor, nn.Linear]:
        """Returns the supervised tokens' hidden states [n, d] as input of the output embeddings, and those embeddings."""
        head = self.causal.get_output_embeddings()
        hidden = self.causal.base_model(**self._inputs(batch))[0]
        if torch.is_autocast_enabled("cpu"):
            hidden = hidden.to(torch.get_autocast_dtype("cpu"))
        return hidden.flatten(0, 1)[batch.supervised], head
