"""Requests as vLLM's front end sends them to a core."""

from __future__ import annotations

from itertools import count
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

EOS = 2
_arrivals = count()


def request(name: str, prompt: list[int], **params: Any) -> EngineCoreRequest:
    """A request as the front end sends it: greedy, eight tokens, no end before."""
    asked = SamplingParams(**({"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | params))
    asked.update_from_generation_config({}, EOS)
    if asked.structured_outputs:
        asked.structured_outputs._backend = "xgrammar"
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=asked,
        pooling_params=None,
        arrival_time=float(next(_arrivals)),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
