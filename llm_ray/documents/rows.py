"""Builds the request for questions and answers about a passage, and parses the response into rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llm_ray.documents.passages import Passage

SYSTEM = """\
You write questions and answers about a passage of a document. They teach somebody who will never see the passage.
- Ask what the passage answers, and answer with what it says, without adding anything.
- Name the subject in each question, so that it is clear without the passage. Never mention the passage or the document.
- Answer in whole sentences, in the language of the passage.
- Ask each thing once. If the passage says nothing worth knowing, write no question."""
ABOUT_THE_PASSAGE = re.compile(
    r"\b(the|this|that|given|above|following) (passage|text|excerpt|paragraph|document|section|context)\b",
    re.IGNORECASE,
)
"""English only: for other languages, only the prompt prevents such questions."""


@dataclass(frozen=True, slots=True)
class Row:
    """A question and answer about `passage`."""

    question: str
    answer: str
    passage: Passage

    def values(self, model: str) -> dict[str, Any]:
        """Returns the row as written to a file: `messages` to train on, and their source."""
        about = self.passage
        lines = {"page": about.first} if about.paged else {"lines": [about.first, about.last]}
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ],
            "source": {"file": about.document, **lines, "heading": list(about.heading), "passage": about.text},
            "written_by": model,
        }


def messages(passage: Passage, rows: int, instructions: str) -> list[dict[str, str]]:
    """Returns the conversation that requests at most `rows` rows about `passage`; `instructions` are the user's
    additions."""
    subject = " > ".join(dict.fromkeys([passage.title, *passage.heading]))
    return [
        {"role": "system", "content": f"{SYSTEM}\n{instructions}".strip()},
        {
            "role": "user",
            "content": f"Subject: {subject}\n\nPassage:\n{passage.text}\n\nWrite up to {rows} questions, each with its answer.",
        },
    ]


def response_format(rows: int) -> dict[str, Any]:
    """Returns the OpenAI API's response_format that constrains the answer to JSON of this schema."""
    text = {"type": "string"}
    row = {
        "type": "object",
        "properties": {"question": text, "answer": text},
        "required": ["question", "answer"],
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {"rows": {"type": "array", "items": row, "maxItems": rows}},
        "required": ["rows"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "questions_and_answers", "strict": True, "schema": schema}}


@dataclass(frozen=True, slots=True)
class Read:
    """The contents of an answer: complete rows, the numbers of truncated and of empty ones, and whether it is JSON of
    the requested form at all."""

    rows: tuple[Row, ...]
    cut: int = 0
    empty: int = 0
    form: bool = True


def read_answer(text: str, passage: Passage, most: int) -> Read:
    """Parses the first `most` rows of the answer `text`. From a truncated answer, complete rows are kept."""
    from pydantic_core import from_json

    begin = text.find("{")  # endpoints that ignore response_format may add text or a code fence
    end = text.rfind("}") + 1
    try:
        found = from_json(text[begin:end]) if begin >= 0 else None
    except ValueError:
        try:
            found = from_json(text[begin:], allow_partial=True)
        except ValueError:
            found = None
    given = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(given, list):
        return Read((), form=False)
    rows, cut, empty = [], 0, 0
    for values in given[:most]:
        question, answer = (values.get(key) if isinstance(values, dict) else None for key in ("question", "answer"))
        if not isinstance(question, str) or not isinstance(answer, str):
            cut += 1
        elif not question.strip() or not answer.strip():
            empty += 1
        else:
            rows.append(Row(question.strip(), answer.strip(), passage))
    return Read(tuple(rows), cut, empty)
