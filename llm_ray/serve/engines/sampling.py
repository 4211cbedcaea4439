"""Samples the next token of every row of a batch with vLLM's sampler, for engines without a sampler of their own.

Penalties, biases and other logits processors, their order, and logprobs of the raw logits are vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.utils.torch_utils import make_tensor_with_pad
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

_CPU = torch.device("cpu")
_NOTHING_LEFT = (
    "the request leaves no token to choose: its allowed_token_ids, bad_words, min_tokens and constraints "
    "(structured_outputs, response_format, tools) exclude each other"
)
# Tokens sorted first: they nearly always contain all that top_k and top_p keep.
_LIKELY = 1024


class CheckedSampler(Sampler):
    """vLLM's sampler, which also records rows without a valid token. The tokens sampled for those rows are
    meaningless."""

    stuck: dict[int, str | None]
    """Rows of the last batch without a valid token, each with the message for its client; None if its logits contain
    NaN or positive infinity."""

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        highest = logits.amax(dim=-1)  # NaN if any logit is NaN
        wrong = ~highest.isfinite()
        self.stuck = {
            row: _NOTHING_LEFT if highest[row] == -torch.inf else None for row in wrong.nonzero()[:, 0].tolist()
        }
        if self.stuck:
            logits = logits.masked_fill(wrong[:, None], 0)
        return super().sample(logits, sampling_metadata, logprobs_mode_override)


def failure(request_id: str, reason: str | None) -> EngineCoreOutput:
    """Returns the output that ends a request with an error. The front end reports `reason` to the client as 400; None
    is an engine failure, 503."""
    return EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR, stop_reason=reason)


class PlainSampler(CheckedSampler):
    """vLLM's sampler in plain torch: without vLLM's kernels, which do not load with IPEX's torch, and without
    torch.compile, which needs a compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.topk_topp_sampler.forward = _draw

    @staticmethod
    def greedy_sample(logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)

    @staticmethod
    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
        chosen = token_ids[:, None]
        likeliest = logprobs.topk(num_logprobs, dim=-1)
        own = logprobs.gather(-1, chosen)
        return LogprobsTensors(
            torch.cat([chosen, likeliest.indices], dim=1).int(),
            torch.cat([own, likeliest.values], dim=1),
            (logprobs >= own).sum(-1),
        )


def _draw(
    logits: torch.Tensor, generators: dict[int, torch.Generator], k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    """Samples a token for each row of logits [rows, vocabulary] from the `k` likeliest tokens [rows] and, among these,
    those within probability mass `p` [rows].

    vLLM's torch implementation sorts the vocabulary and draws a random number for every token, which took half as long
    as the forward pass of a small model. Each row's sample is independent of the other rows.
    """
    rows, vocabulary = logits.shape
    probabilities = logits.softmax(dim=-1)
    numbers = torch.rand(rows)
    for row, generator in generators.items():
        numbers[row] = torch.rand((), generator=generator)
    limit = torch.full((rows,), vocabulary) if k is None else k
    share = torch.ones(rows) if p is None else p
    narrowed = (limit < vocabulary) | (share < 1)
    drawn = torch.empty(rows, dtype=torch.int64)
    if not narrowed.all():
        drawn[~narrowed] = _at(probabilities[~narrowed], numbers[~narrowed])
    if narrowed.any():
        kept, tokens = _likeliest(probabilities[narrowed], limit[narrowed, None], share[narrowed, None])
        drawn[narrowed] = tokens.gather(1, _at(kept, numbers[narrowed])[:, None])[:, 0]
    return drawn, None


def _likeliest(probabilities: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns probabilities in descending order and their tokens, both [rows, columns]. Probabilities beyond `k` and
    `p`, both [rows, 1], are zero."""
    vocabulary = probabilities.shape[1]
    kept, tokens = probabilities.topk(min(_LIKELY, vocabulary))
    if ((k > _LIKELY) & ((k < vocabulary) | (kept.sum(-1, keepdim=True) < p))).any():
        kept, tokens = probabilities.sort(descending=True)
    kept = kept.masked_fill(torch.arange(kept.shape[1]) >= k, 0)
    total = torch.where(k < vocabulary, kept.sum(-1, keepdim=True), 1.0)  # mass of the k likeliest
    before = kept.cumsum(-1) - kept
    return kept.masked_fill((before >= p * total) & (before > 0), 0), tokens


def _at(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Returns, for each row, the column where the cumulative probability exceeds `numbers` (0 to 1) times the row's
    sum."""
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, sums[:, -1:] * numbers[:, None], right=True)[:, 0]


def metadata(
    requests: list[Request],
    params: list[SamplingParams],
    generators: dict[int, torch.Generator],
    config: VllmConfig,
    vocabulary: int,
) -> SamplingMetadata:
    """Returns the sampler's metadata of a batch. It stays valid while the batch holds the same requests, also as their
    outputs grow."""
    outputs = [request._output_token_ids for request in requests]  # not copies: the lists grow
    processors = LogitsProcessors(
        kind(config, _CPU, False) for kind in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)
    )
    added = [
        (i, p, request.prompt_token_ids, out)
        for i, (p, request, out) in enumerate(zip(params, requests, outputs, strict=True))
    ]
    for processor in processors.all:
        processor.update_state(BatchUpdate(len(requests), removed=[], added=added, moved=[]))
    greedy = [p.sampling_type == SamplingType.GREEDY for p in params]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    penalties = any(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1 for p in params)
    logprobs = [vocabulary if p.logprobs == -1 else p.logprobs for p in params if p.logprobs is not None]
    return SamplingMetadata(
        temperature=None
        if all(greedy)
        else torch.tensor([0.0 if g else p.temperature for g, p in zip(greedy, params, strict=True)]),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=torch.tensor([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None,
        top_k=torch.tensor(top_k, dtype=torch.int32) if min(top_k) < vocabulary else None,
        generators=generators,
        max_num_logprobs=max(logprobs, default=None),
        no_penalties=not penalties,
        prompt_token_ids=_padded([request.prompt_token_ids or [] for request in requests], vocabulary)
        if penalties
        else None,
        frequency_penalties=torch.tensor([p.frequency_penalty for p in params]),
        presence_penalties=torch.tensor([p.presence_penalty for p in params]),
        repetition_penalties=torch.tensor([p.repetition_penalty for p in params]),
        output_token_ids=outputs,
        allowed_token_ids_mask=_forbidden(params, vocabulary),
        bad_words_token_ids={i: p.bad_words_token_ids for i, p in enumerate(params) if p.bad_words_token_ids},
        logitsprocs=processors,
    )


def _padded(tokens: list[list[int]], pad: int) -> torch.Tensor:
    return make_tensor_with_pad(tokens, pad=pad, dtype=torch.int64, device="cpu")


def _forbidden(params: list[SamplingParams], vocabulary: int) -> torch.Tensor | None:
    """Returns a mask [rows, vocabulary], True for tokens that a row must not choose; None if no request has
    allowed_token_ids."""
    if not any(p.allowed_token_ids for p in params):
        return None
    mask = torch.zeros(len(params), vocabulary, dtype=torch.bool)
    for row, p in enumerate(params):
        if p.allowed_token_ids:
            mask[row] = True
            mask[row, p.allowed_token_ids] = False
    return mask
