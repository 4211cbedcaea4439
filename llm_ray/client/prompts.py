"""Reads prompts from files: a text file with one prompt per line, or rows of JSON lines, JSON, CSV and other data
formats.

| columns (optional ones in brackets) | prompt |
| --- | --- |
| messages | the conversation: a list of {role, content} |
| prompt | the text |
| text | the text |
| instruction, [input] | both, separated by an empty line |

Each row may have `system`, a system message for its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.data.sources import read
from llm_ray.errors import DataError, LlmRayError

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt. `content` is text or a conversation; `place` is its file and line, empty for a typed prompt."""

    content: str | list[Message]
    place: str = ""
    system: str | None = None

    def messages(self, system: str | None) -> list[Message]:
        """Returns the conversation to send. Its system message is its own first turn, else the row's, else `system`."""
        turns = [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content
        before = self.system or system
        return [{"role": "system", "content": before}, *turns] if before and turns[0]["role"] != "system" else turns


def read_prompts(file: Path) -> list[Prompt]:
    """Returns the prompts of `file`, in order; empty lines of a text file are skipped.

    Raises DataError, with file and line, for a row without a prompt, and for a file without any.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    prompts = []
    for row in read(str(file), _raise):
        if file.suffix.lower() == ".txt" and not row.values["text"].strip():
            continue
        prompts.append(Prompt(_content(row.values, row.place), row.place, _system(row.values, row.place)))
    if not prompts:
        raise DataError(f"{file}: contains no prompts")
    return prompts


def _raise(error: LlmRayError) -> None:
    raise error


def _content(values: Mapping[str, Any], place: str) -> str | list[Message]:
    if (messages := values.get("messages")) is not None:
        good = isinstance(messages, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in messages
        )
        if not good or not messages:
            raise DataError(f"{place}: 'messages' must be a list of objects with role and content")
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"{place}: 'messages' ends with an assistant's turn, so there is nothing to ask: remove that turn"
            )
        return list(messages)
    column = next((name for name in ("prompt", "text", "instruction") if values.get(name) is not None), None)
    if column is None:
        names = ", ".join(map(str, values)) or "none"
        raise DataError(
            f"{place}: no prompt in the row: it needs a column prompt, text, instruction or messages, but has {names}"
        )
    if not isinstance(values[column], str) or not values[column].strip():
        raise DataError(f"{place}: {column!r} must be non-empty text")
    more = values.get("input") if column == "instruction" else None
    if more and not isinstance(more, str):
        raise DataError(f"{place}: 'input' must be text")
    return f"{values[column]}\n\n{more}" if more else str(values[column])


def _system(values: Mapping[str, Any], place: str) -> str | None:
    system = values.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{place}: 'system' must be text")
    return system or None
