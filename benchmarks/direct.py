"""Our engines without Ray and HTTP, in one process, to measure the overhead of both.

python -m benchmarks.direct SERVED-MODEL-AS-JSON
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from pydantic import TypeAdapter

from benchmarks.vllm_floor import PROMPT, TOKENS
from llm_ray.serve.models import ServedModel
from llm_ray.serve.replica.deployment import environment


async def measure(model: ServedModel) -> dict[str, float]:
    """Returns output tokens/s of 1 and of 16 concurrent requests."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs

    from llm_ray.serve.engines.frontend import front_end
    from llm_ray.serve.replica.server import engine_arguments

    front = front_end(model, AsyncEngineArgs(model=str(model.path), **engine_arguments(model)).create_engine_config())

    async def ask(prompt: str, tokens: int) -> None:
        async for _ in front.generate(
            prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), prompt
        ):
            pass

    await ask("warm up", 8)
    figures = {}
    for count in (1, 16):
        began = time.monotonic()
        await asyncio.gather(*(ask(f"{PROMPT} {i} of {count}.", TOKENS) for i in range(count)))
        figures[str(count)] = count * TOKENS / (time.monotonic() - began)
    front.shutdown()
    return figures


if __name__ == "__main__":
    served = TypeAdapter(ServedModel).validate_json(sys.argv[1])
    os.environ.update(environment(served))
    print(json.dumps(asyncio.run(measure(served))))
