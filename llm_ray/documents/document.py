"""A document as blocks of text with their positions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list, table, … or a heading, as Markdown. `at` and `last` are its first and last line (for HTML both
    the first), or both its page in a paged document, counted from 1. `level` is 1 to 6 for a heading, else 0."""

    text: str
    at: int
    last: int
    level: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """`name` is the path relative to the documents' folder; `note` says which parts could not be read."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    paged: bool = False
    note: str = ""


def heading(level: int, title: str, at: int) -> Block:
    """Returns a heading's block."""
    return Block(f"{'#' * level} {' '.join(title.split())}", at, at, level)
