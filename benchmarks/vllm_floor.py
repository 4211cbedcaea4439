"""Baseline of serving: vLLM's CPU engine with its defaults, called offline in its own process.

python -m benchmarks.vllm_floor MODEL
"""

from __future__ import annotations

import json
import os
import sys
import time

TOKENS = 128
PROMPT = "Tell me a long story about the number"


def main(model: str) -> None:
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, dtype="float32", max_model_len=2048, kv_cache_memory_bytes=2**30, enforce_eager=True)
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    engine.generate([PROMPT], SamplingParams(max_tokens=8), use_tqdm=False)
    figures = {}
    for count in (1, 16):
        began = time.monotonic()
        engine.generate([f"{PROMPT} {i}." for i in range(count)], sampling, use_tqdm=False)
        figures[str(count)] = count * TOKENS / (time.monotonic() - began)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
