"""Joins short texts, such as the lines of a .txt file, into longer ones that keep their context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Join:
    """Joins the column ``text`` of consecutive rows by line breaks, into texts of at least `characters` that end before
    an empty line.

    Without an empty line, a text ends at twice that length.
    """

    def __init__(self, characters: int = 8000) -> None:
        self.characters = characters

    def __call__(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        lines: list[str] = []
        length = 0
        for row in rows:
            line = str(row["text"])
            if lines and length >= self.characters * (1 if not line.strip() else 2):
                yield {"text": "\n".join(lines)}
                lines, length = [], 0
            if line.strip() or lines:
                lines.append(line)
                length += len(line) + 1
        if lines:
            yield {"text": "\n".join(lines).rstrip("\n")}
