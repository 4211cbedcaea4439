"""An engine's core with LoRA adapters in this process, and what peft answers in its place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_ray.conf.engines import EngineName
from llm_ray.serve.models import ServedModel
from llm_ray.serve.replica.server import engine_arguments

TOKENS = 3
Answer = tuple[list[int], list[float]]


def prompt(number: int) -> list[int]:
    return [(7 * number + place) % 200 + 1 for place in range(3 + number % 100)]


@dataclass
class Engine:
    """A core behind vLLM's front end, in this process, and the event loop that it lives in."""

    client: Any
    runner: asyncio.Runner

    def load(self, number: int, folder: Path) -> None:
        self.runner.run(self.client.add_lora(self._lora(number, folder)))

    def ask(self, asked: dict[int, Path | None], prompted: int | None = None, **more: Any) -> dict[int, Answer]:
        """Answers to requests that are computed together, by the number of each one's adapter.

        Each has a prompt of its own, or all have that of the number `prompted`; `more` are sampling parameters.
        """

        async def together() -> list[Answer]:
            return await asyncio.gather(
                *(
                    self._answer(number, folder, prompt(number if prompted is None else prompted), **more)
                    for number, folder in asked.items()
                )
            )

        return dict(zip(asked, self.runner.run(together()), strict=True))

    def _lora(self, number: int, folder: Path) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(folder.name, number, str(folder))

    async def _answer(self, number: int, folder: Path | None, ids: list[int], **more: Any) -> Answer:
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import SamplingParams

        settings = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(**settings | more)
        lora = self._lora(number, folder) if folder else None
        async for answer in self.client.generate(
            TokensPrompt(prompt_token_ids=ids), params, f"r{number}", lora_request=lora
        ):
            last = answer.outputs[0]
        return list(last.token_ids), [
            logprobs[token].logprob for token, logprobs in zip(last.token_ids, last.logprobs, strict=True)
        ]


@contextlib.contextmanager
def started(base: Path, engine: EngineName = "vllm") -> Iterator[Engine]:
    """An engine with the model in the folder `base`; one at a time."""
    from vllm.distributed import destroy_model_parallel
    from vllm.engine.arg_utils import AsyncEngineArgs

    from llm_ray.serve.engines.frontend import front_end

    destroy_model_parallel()  # of an engine before it in this process

    model = ServedModel(
        "m", base, engine=engine, max_model_len=64, kv_cache_bytes=2**24, max_batch=16, threads=2, lora_rank=8
    )

    async def start() -> Any:
        arguments = AsyncEngineArgs(model=str(base), skip_tokenizer_init=engine == "vllm", **engine_arguments(model))
        return front_end(model, arguments.create_engine_config())

    with asyncio.Runner() as runner:
        client = runner.run(start())
        try:
            yield Engine(client, runner)
        finally:
            client.shutdown()


def expected(base: Path, adapter: Path | None, number: int) -> Answer:
    """What peft answers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids, logprobs = prompt(number), []
    for _ in range(TOKENS):
        with torch.no_grad():
            likeliest = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], dim=-1).max(0)
        ids, logprobs = [*ids, int(likeliest.indices)], [*logprobs, float(likeliest.values)]
    return ids[-TOKENS:], logprobs


def assert_right(told: dict[int, Answer], right: dict[int, Answer], where: str = "") -> None:
    for who, (tokens, logprobs) in told.items():
        assert tokens == right[who][0], (who, where)
        assert logprobs == pytest.approx(right[who][1], abs=1e-3), (who, where)
