"""Answers a file of prompts concurrently and stores each answer as it arrives.

    with open_answers(Path("answers.jsonl"), prompts, "quickstart", settings) as answers:
        failures = answer_all(endpoint, "quickstart", settings, answers.open_prompts, 8, answers.keep)

Answers are JSON lines in order of completion: index (of the prompt, from 0), prompt, model, text, finish_reason, usage,
seconds, settings. An existing file is continued: prompts that it already answers are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from llm_ray.client.ask import Answer, Asker, Settings
from llm_ray.client.endpoint import Endpoint
from llm_ray.client.errors import Failed, Refused
from llm_ray.client.prompts import Prompt
from llm_ray.errors import ConfError
from llm_ray.files import append_alone, whole_lines
from llm_ray.progress import Bar

Numbered = tuple[int, Prompt]
OnAnswer = Callable[[int, Prompt, Answer | Failed], None]
BEGINNING = b'{"index": '
"""Start of each row; identifies a partly written one."""


def row(index: int, prompt: Prompt, answer: Answer, settings: Settings) -> dict[str, Any]:
    """Returns an answer as a JSON row."""
    values = asdict(answer)
    return {
        "index": index,
        "prompt": prompt.content,
        **values,
        "seconds": round(answer.seconds, 3),
        "settings": settings.given(),
    }


def answer_all(
    endpoint: Endpoint,
    model: str,
    settings: Settings,
    prompts: Sequence[Numbered],
    concurrency: int,
    keep: OnAnswer,
    bar: Bar | None = None,
) -> list[tuple[Prompt, Failed]]:
    """Sends all prompts, `concurrency` at a time, passes each answer or error to `keep` as it completes, and returns
    the failures.

    `bar` shows prompts done and tokens/s. Raises Failed if every request would fail the same way: no connection, a
    wrong key, an unknown model.
    """
    failures: list[tuple[Prompt, Failed]] = []
    began, done, tokens = time.monotonic(), 0, 0
    waiting = iter(prompts)

    def tell(text: str) -> None:
        if bar:
            bar.update(done, len(prompts), text + (f", {len(failures)} failed" if failures else ""))

    async def worker(asker: Asker) -> None:
        nonlocal done, tokens
        for index, prompt in waiting:
            try:
                answer: Answer | Failed = await asker.ask(prompt)
            except Failed as error:
                if error.fatal:
                    raise
                answer = error
            keep(index, prompt, answer)
            done += 1
            if isinstance(answer, Failed):
                failures.append((prompt, answer))
            elif answer.usage:
                tokens += answer.usage.get("completion_tokens", 0)
            tell(f"{tokens / (time.monotonic() - began):.0f} tokens/s")

    def on_wait(seconds: float, error: Refused) -> None:
        tell(f"the endpoint is busy ({error.status}): retrying in {seconds:.0f} s")

    async def all_workers() -> None:
        async with Asker(endpoint, model, settings, on_wait) as asker, asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(prompts))):
                group.create_task(worker(asker))

    try:
        asyncio.run(all_workers())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return failures


class InOrder:
    """Prints answers in the order of the prompts: as text separated by empty lines, or as JSON lines if `settings` are
    given."""

    def __init__(self, file: TextIO, settings: Settings | None) -> None:
        self._file, self._settings = file, settings
        self._next = 0
        self._early: dict[int, str] = {}

    def keep(self, index: int, prompt: Prompt, answer: Answer | Failed) -> None:
        """Prints the answer once all earlier ones are printed. A failed one is skipped; it is reported on standard
        error."""
        if isinstance(answer, Failed):
            self._early[index] = ""
        elif self._settings:
            self._early[index] = json.dumps(row(index, prompt, answer, self._settings), ensure_ascii=False) + "\n"
        else:
            self._early[index] = f"{prompt.place}\n{answer.text}\n\n"
        while self._next in self._early:
            self._file.write(self._early.pop(self._next))
            self._next += 1
        self._file.flush()


class Answers:
    """The open answers file. `open_prompts` are the prompts that it does not answer yet."""

    def __init__(self, file: TextIO, prompts: list[Prompt], done: set[int], settings: Settings) -> None:
        self.open_prompts = [(index, prompt) for index, prompt in enumerate(prompts) if index not in done]
        self._file, self._settings = file, settings

    def keep(self, index: int, prompt: Prompt, answer: Answer | Failed) -> None:
        """Appends an answer. Failures are not stored, so the next run retries them."""
        if isinstance(answer, Failed):
            return
        self._file.write(json.dumps(row(index, prompt, answer, self._settings), ensure_ascii=False) + "\n")
        self._file.flush()


@contextlib.contextmanager
def open_answers(path: Path, prompts: list[Prompt], model: str, settings: Settings) -> Iterator[Answers]:
    """Opens (or creates) and locks the answers file `path`, and removes an incomplete last line.

    Raises ConfError if the file holds answers to other prompts, of another model or with other settings, is not an
    answers file, or is locked by another process; DataError if it cannot be written.
    """
    with append_alone(path, f"--output {path}") as file:
        done = _done(path, prompts, model, settings)
        yield Answers(file, prompts, done, settings)


def _done(path: Path, prompts: list[Prompt], model: str, settings: Settings) -> set[int]:
    """Returns the indices answered in `path`, after checking its rows against prompts, model and settings."""
    done = set()
    for line, raw in enumerate(whole_lines(path, BEGINNING), 1):
        try:
            found = json.loads(raw)
            index, asked, by, how = found["index"], found["prompt"], found["model"], found["settings"]
            same = prompts[index].content == asked if isinstance(index, int) and 0 <= index < len(prompts) else False
        except (ValueError, KeyError, TypeError) as error:
            raise ConfError(f"--output {path}:{line} is not an answer of llm-ray infer: use another file") from error
        if not same or by != model or how != settings.given():
            what = (
                f"answers a different prompt than number {index}"
                if not same
                else f"was answered by {by}, not by {model}"
                if by != model
                else f"was asked with {_shown(how)}, not with {_shown(settings.given())}"
            )
            raise ConfError(
                f"--output {path}:{line} {what}: a file can only be continued with the same prompts and "
                "settings. Use another file"
            )
        done.add(index)
    return done


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "no settings"
