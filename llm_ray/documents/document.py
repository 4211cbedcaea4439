"""A document as it is read: blocks of text that know where they stand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list, table, … or a heading, in Markdown. `at` and `last` are the lines on which it begins and ends (of
    HTML both where it begins), or both the page of a document that has pages; all count from 1. `level` is 1 to 6 for a
    heading, else 0."""

    text: str
    at: int
    last: int
    level: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """`name` is the path below the folder of documents; `note` says what of it could not be read."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    paged: bool = False
    note: str = ""


def heading(level: int, title: str, at: int) -> Block:
    """The block of a heading."""
    return Block(f"{'#' * level} {' '.join(title.split())}", at, at, level)
