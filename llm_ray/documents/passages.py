"""Splits documents into passages, short enough to ask about, at headings and paragraphs if possible."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from llm_ray.documents.document import Block, Document

LEAST = 80
"""Minimum characters of a passage besides headings: less is a caption, a page number, a link."""
BORDERS = (re.compile(r"\n"), re.compile(r"(?<=[.!?。！？])\s*(?=\S)"), re.compile(r"\s+"))
"""Where too long blocks are cut: between lines, else sentences, else words."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive text of a document. `first` and `last` are its lines, or both its page in a `paged` document.
    `heading` lists the enclosing headings, outermost first."""

    document: str
    title: str
    heading: tuple[str, ...]
    text: str
    first: int
    last: int
    paged: bool

    @property
    def place(self) -> str:
        """Document and position, for display."""
        return f"{self.document}, page {self.first}" if self.paged else f"{self.document}:{self.first}"

    @property
    def likeness(self) -> str:
        """A hash of the words, ignoring case and whitespace."""
        return hashlib.sha256(" ".join(self.text.lower().split()).encode()).hexdigest()


def split(document: Document, characters: int) -> list[Passage]:
    """Returns the passages of `document`, each with at most `characters` besides its headings, and within one page.
    Passages with fewer than :data:`LEAST` characters are left out."""
    passages = []
    titles: dict[int, str] = {}
    for group in _groups(document, characters):
        for block in group:
            if not block.level:
                break
            _enter(titles, block)
        above = tuple(titles[level] for level in sorted(titles))
        for block in group:
            if block.level:
                _enter(titles, block)
        if sum(len(block.text) for block in group if not block.level) < LEAST:
            continue
        text = "\n\n".join(block.text for block in group)
        passages.append(
            Passage(document.name, document.title, above, text, group[0].at, group[-1].last, document.paged)
        )
    return passages


def _enter(titles: dict[int, str], block: Block) -> None:
    """Updates `titles`, the enclosing headings by level, for the heading `block`."""
    for level in [level for level in titles if level >= block.level]:
        del titles[level]
    titles[block.level] = block.text.lstrip("# ")


def _groups(document: Document, characters: int) -> Iterator[list[Block]]:
    """Yields the blocks of each passage: as many as fit; a heading begins a new passage if the current one is at least
    half full."""
    group: list[Block] = []
    length = 0
    for block in chain.from_iterable(_pieces(whole, characters, document.paged) for whole in document.blocks):
        full = length > 0 and not block.level and length + len(block.text) > characters
        turned = document.paged and bool(group) and block.at != group[-1].at
        if full or turned or (block.level and length >= characters // 2):
            carried: list[Block] = []
            while group[-1].level and not turned:  # a heading stays with what follows
                carried.insert(0, group.pop())
            yield group
            group, length = carried, 0
        group.append(block)
        length += 0 if block.level else len(block.text)
    if group:
        yield group


def _pieces(block: Block, characters: int, paged: bool) -> Iterator[Block]:
    if len(block.text) <= characters:
        yield block
        return
    at = 0
    for piece in _cut(block.text, characters, BORDERS):
        if piece.strip():
            begins = block.at + (0 if paged else block.text.count("\n", 0, at))
            ends = max(begins, min(block.last, begins + piece.rstrip("\n").count("\n")))
            yield Block(piece.strip("\n"), begins, ends, block.level)
        at += len(piece)


def _cut(text: str, characters: int, borders: Sequence[re.Pattern[str]]) -> Iterator[str]:
    """Yields consecutive pieces of `text` with at most `characters` each."""
    if len(text) <= characters:
        yield text
        return
    if not borders:
        yield from (text[at : at + characters] for at in range(0, len(text), characters))
        return
    ends = [*(match.end() for match in borders[0].finditer(text)), len(text)]
    begin = 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - begin > characters:
            yield from _cut(text[begin:end], characters, borders[1:])
            begin = end
