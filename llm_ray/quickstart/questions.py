"""The bundled questions, and how they are put to a served model."""

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
    """A held-out question about a trained fact; `expect` lists what a correct answer contains (see judge.is_right)."""

    fact: str
    prompt: str
    completion: str
    expect: tuple[str, ...]


def heldout() -> list[Question]:
    """Returns the bundled questions, none of which are in the training data."""
    rows = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Question(row["fact"], row["prompt"], row["completion"], tuple(row["expect"])) for row in rows]


def ask(
    url: str, models: Sequence[str], questions: Sequence[Question], progress: Callable[[int, int], None]
) -> dict[str, list[str]]:
    """Returns each model's answers in the order of `questions`, over the OpenAI API at `url`, at temperature 0.

    Calls `progress` with the number of answers so far and in total. Raises ServeError if a model does not answer.
    """
    import openai

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request

    # The endpoint is local: failures must show at once (no retries), and no proxy may be used (trust_env).
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
                pool.shutdown(wait=False, cancel_futures=True)  # also after Ctrl-C, send no further questions
    return answers
