"""A conversation with one or two models: turns, the answer being generated, and their display."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import json
import logging
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from llm_ray.app.ask import Answer, Connections, Endpoint, Prompt, Settings, ask
from llm_ray.errors import LlmRayError
from llm_ray.progress import Silent

_LOG = logging.getLogger("llm_ray.ui")
_GONE = 20.0  # seconds without a reader after which generation stops
# Tags that models put around thoughts and tool calls.
_PARTS = re.compile(r"<(think|thinking|tool_call)>(.*?)(?:</\1>|\Z)", re.S)
_TITLES = {"think": "Thoughts", "thinking": "Thoughts", "tool_call": "Tool call"}
Message = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """A model's answer so far or in full. `note` holds its figures, or why it ended early."""

    text: str
    note: str = ""
    whole: bool = False
    """Whether it belongs into the conversation: an answer, not an error."""


@dataclass(frozen=True)
class Turn:
    """A question and each model's answer; None for a model that was not asked."""

    question: str
    said: tuple[Said | None, Said | None]


def conversation(turns: list[Turn], side: int) -> list[Message]:
    """Returns the messages to send to a model: the turns that it has answered."""
    found: list[Message] = []
    for turn in turns:
        if (answer := turn.said[side]) and answer.whole:
            found += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer.text}]
    return found


def row(turns: list[Turn], side: int, system: str | None) -> str:
    """Returns the conversation as a row of training data (JSON lines, `messages`); empty if nothing was answered."""
    messages = conversation(turns, side)
    before = [{"role": "system", "content": system}] if system else []
    return json.dumps({"messages": before + messages}, ensure_ascii=False) if messages else ""


def shown(turns: list[Turn], side: int) -> list[Message]:
    """Returns the conversation with one model in the format of Gradio's Chatbot."""
    found: list[Message] = []
    for turn in turns:
        if (answer := turn.said[side]) is None:
            continue
        found.append({"role": "user", "content": turn.question})
        for title, text in parts(answer.text):
            found.append({"role": "assistant", "content": text, **({"metadata": {"title": title}} if title else {})})
        if answer.note:
            found.append({"role": "assistant", "content": f"*{answer.note}*" if answer.whole else answer.note})
    return found


def parts(text: str) -> list[tuple[str, str]]:
    """Splits an answer into (title, text): title "" for plain text, "Thoughts" or "Tool call". An unclosed tag extends
    to the end."""
    found: list[tuple[str, str]] = []
    at = 0
    for match in _PARTS.finditer(text):
        found.append(("", text[at : match.start()]))
        inside = match[2].strip()
        found.append((_TITLES[match[1]], f"```json\n{inside}\n```" if match[1] == "tool_call" else inside))
        at = match.end()
    found.append(("", text[at:]))
    return [(title, piece.strip("\n")) for title, piece in found if piece.strip()]


@functools.cache
def _asking() -> tuple[asyncio.AbstractEventLoop, Connections]:
    """Returns the event loop of all generations, which runs in its own thread, and its connections."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="answers", daemon=True).start()
    return loop, Connections()


@dataclass
class Generation:
    """An answer being generated. It ends with `stop`, or if nobody reads it for a while."""

    endpoint: Endpoint
    model: str
    prompt: Prompt
    settings: Settings
    done: bool = False
    _texts: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _first: float | None = None
    _answer: Answer | None = None
    _problem: str = ""
    _looked: float = field(default_factory=time.monotonic)
    _task: concurrent.futures.Future[None] | None = None

    def begin(self, changed: threading.Event) -> None:
        """Starts the generation; `changed` is set whenever there is more to show."""
        self._changed = changed
        self._task = asyncio.run_coroutine_threadsafe(self._run(), _asking()[0])
        self._task.add_done_callback(self._end)

    def stop(self) -> None:
        """Stops the generation, also in the engine."""
        if self._task:
            self._task.cancel()

    def said(self) -> Said:
        """Returns the answer so far."""
        self._looked = time.monotonic()
        text = "".join(self._texts)
        if not self.done:
            return Said(text)
        if self._answer:
            return Said(text, _figures(self._answer, self._first), whole=True)
        if self._problem:
            return Said(text, self._problem)
        return Said(text, "Stopped.", whole=bool(text))

    async def _run(self) -> None:
        asked = asyncio.create_task(self._ask())
        try:
            while not (await asyncio.wait({asked}, timeout=1))[0]:
                if time.monotonic() - self._looked > _GONE:
                    asked.cancel()
            self._answer = asked.result()
        except LlmRayError as error:
            self._problem = _problem(error)
        except Exception:
            _LOG.exception("while a model was asked")
            self._problem = "This is a bug in llm-ray; see the log of llm-ray ui."
        finally:
            asked.cancel()

    async def _ask(self) -> Answer:
        connections = _asking()[1]
        return await ask(self.endpoint, self.model, self.prompt, self.settings, Silent(), self._more, connections)

    def _end(self, task: concurrent.futures.Future[None]) -> None:
        self.done = True
        self._changed.set()

    def _more(self, text: str) -> None:
        if self._first is None:
            self._first = time.monotonic() - self._began
        self._texts.append(text)
        self._changed.set()


def _figures(answer: Answer, first: float | None) -> str:
    tokens = answer.usage["completion_tokens"] if answer.usage else None
    found = [f"{tokens:,} tokens"] if tokens else []
    if tokens and answer.seconds > 0:
        found.append(f"{tokens / answer.seconds:.1f} tokens/s")
    if first is not None:
        found.append(f"first token after {first * 1000:,.0f} ms")
    if answer.finish_reason == "length":
        found.append("cut off at the token limit")
    return " · ".join(found)


def _problem(error: LlmRayError) -> str:
    if getattr(error, "status", None) == 401:
        return (
            "The endpoint requires an API key, or rejects this one. Enter one in the field API key under Settings; "
            "an admin can create one on the screen Cluster."
        )
    return str(error)
