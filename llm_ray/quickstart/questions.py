"""The bundled questions, and asking them of a served model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from llm_ray.errors import ServeError

DATA = Path(__file__).parent / "data"
AT_ONCE = 8
MAX_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """A held-out question about a trained fact; `expect` is what a right answer holds (see judge.is_right)."""

    fact: str
    prompt: str
    completion: str
    expect: tuple[str, ...]


def heldout() -> list[Question]:
    """The questions that ship, none of them trained on."""
    rows = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Question(row["fact"], row["prompt"], row["completion"], tuple(row["expect"])) for row in rows]


def ask(
    url: str, models: Sequence[str], questions: Sequence[Question], progress: Callable[[int, int], None]
) -> dict[str, list[str]]:
    """Each model's answers in the order of `questions`, over the OpenAI API at `url`, without chance (temperature 0).

    `progress` gets the answers that are there and those there will be. Raises ServeError when a model does not answer.
    """
    import openai

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request

    # max_retries=0: the endpoint is this machine's own, and a failure is to be seen. No proxy is asked for a loopback
    # address.
    with openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=300, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as client:

        def answer(model: str, question: Question) -> str:
            reply = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question.prompt}],
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
            return (reply.choices[0].message.content or "").strip()

        answers = {model: [""] * len(questions) for model in models}
        with ThreadPoolExecutor(AT_ONCE * len(models)) as pool:
            jobs = {
                pool.submit(answer, model, question): (model, at)
                for at, question in enumerate(questions)
                for model in models
            }
            try:
                for done, job in enumerate(as_completed(jobs), 1):
                    model, at = jobs[job]
                    answers[model][at] = job.result()
                    progress(done, len(jobs))
            except openai.OpenAIError as error:
                raise ServeError(f"{model} at {url} did not answer: {error}") from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, too, ask nothing more
    return answers
