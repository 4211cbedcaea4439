"""Asks a deployed model: one question, streamed or not, or a file of prompts.

endpoint = parse("http://127.0.0.1:8000/v1", find_key(None, None, {}))
answer = await ask(endpoint, "support-bot", Prompt("Who are you?"), Settings(max_tokens=64), reporter, on_text=show)
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_ray.client.ask import Answer, Asker, OnText, Settings, choose_model
from llm_ray.client.batch import InOrder, OnAnswer, answer_all, open_answers
from llm_ray.client.connections import Connections
from llm_ray.client.endpoint import Endpoint, Key, certificates, find_key, parse
from llm_ray.client.errors import Failed
from llm_ray.client.prompts import Prompt, read_prompts
from llm_ray.errors import ConfError, ServeError
from llm_ray.progress import Reporter

__all__ = [
    "Answer",
    "Batch",
    "Connections",
    "Endpoint",
    "Failed",
    "InOrder",
    "Key",
    "Prompt",
    "Settings",
    "ask",
    "ask_all",
    "find_key",
    "parse",
    "prepare_to_ask",
    "read_prompts",
]

SHOWN_FAILURES = 10


@dataclass(frozen=True)
class Batch:
    """The outcome of a batch: total number of prompts, how many were sent now (the output file already had answers to
    the others), and the failures with their reasons."""

    prompts: int
    asked: int
    failures: tuple[tuple[Prompt, Failed], ...]
    output: Path | None

    def check(self) -> None:
        """Raises ServeError, naming the first failures, if any prompt was not answered."""
        if not self.failures:
            return
        first = "".join(f"\n  {prompt.place}: {error}" for prompt, error in self.failures[:SHOWN_FAILURES])
        more = f"\n  and {len(self.failures) - SHOWN_FAILURES} more" if len(self.failures) > SHOWN_FAILURES else ""
        again = "; run the same command to ask them again" if self.output else ""
        raise ServeError(f"{len(self.failures)} of {self.prompts} prompts were not answered{again}:{first}{more}")


def prepare_to_ask() -> None:
    """Imports and loads now what would delay the first question."""
    importlib.import_module("openai.resources.chat")  # the SDK imports it lazily
    certificates(False)
    certificates(True)


async def ask(
    endpoint: Endpoint,
    model: str | None,
    prompt: Prompt,
    settings: Settings,
    reporter: Reporter,
    on_text: OnText | None = None,
    connections: Connections | None = None,
) -> Answer:
    """Returns the answer of `model` (None: the endpoint's only model). With `on_text` the answer is streamed, and each
    piece passed on as it arrives. `connections` can be reused for further questions on the same event loop.

    Reports a line before it retries a busy endpoint. Cancellation stops the generation. Raises ConfError, ServeError.
    """

    def on_wait(seconds: float, error: Exception) -> None:
        reporter.line(f"{error}. Retrying in {seconds:.0f} s")

    _check(endpoint, settings, [prompt])
    named = await choose_model(endpoint, model, settings.timeout)
    async with Asker(endpoint, named, settings, on_wait, connections) as asker:
        return await asker.ask(prompt, on_text)


def ask_all(
    endpoint: Endpoint,
    model: str | None,
    prompts: list[Prompt],
    settings: Settings,
    reporter: Reporter,
    *,
    concurrency: int = 8,
    output: Path | None = None,
    on_answer: OnAnswer = lambda index, prompt, answer: None,
) -> Batch:
    """Sends all prompts, `concurrency` at a time. Answers go to the file `output`, or without it to `on_answer`, as
    they arrive; prompts already answered in `output` are skipped. Must not be called from a thread with a running event
    loop. Raises LlmRayError if no prompt can be sent."""
    _check(endpoint, settings, prompts)
    named = asyncio.run(choose_model(endpoint, model, settings.timeout))
    with contextlib.ExitStack() as stack:
        numbered, keep = list(enumerate(prompts)), on_answer
        if output:
            answers = stack.enter_context(open_answers(output, prompts, named, settings))
            numbered, keep = answers.open_prompts, answers.keep
            if len(numbered) < len(prompts):
                reporter.line(
                    f"{output} already has answers to {len(prompts) - len(numbered)} of {len(prompts)} prompts"
                )
        bar = stack.enter_context(reporter.bar("prompts", len(numbered)))
        try:
            failures = answer_all(endpoint, named, settings, numbered, concurrency, keep, bar)
        except (KeyboardInterrupt, ServeError):
            if output:
                reporter.line(
                    f"{output} keeps the answers received so far: run the same command to continue from there"
                )
            raise
    return Batch(len(prompts), len(numbered), tuple(failures), output)


def _check(endpoint: Endpoint, settings: Settings, prompts: Sequence[Prompt]) -> None:
    if not settings.completion:
        return
    if not endpoint.openai:
        raise ConfError(f"--completion: a model's own route supports only chat; use the OpenAI API, {endpoint.base}")
    if settings.system:
        raise ConfError("--completion sends the raw prompt: do not use --system with it")
    for prompt in prompts:
        if not isinstance(prompt.content, str) or prompt.system:
            raise ConfError(f"{prompt.place}: a conversation or a system message, which --completion does not accept")
