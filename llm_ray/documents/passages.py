"""Documents as passages: pieces short enough to ask about, which begin at headings and paragraphs where they can."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from llm_ray.documents.document import Block, Document

LEAST = 80
"""Characters below headings that a passage needs: less is a caption, a page number, a link."""
BORDERS = (re.compile(r"\n"), re.compile(r"(?<=[.!?。！？])\s*(?=\S)"), re.compile(r"\s+"))
"""Where a block is cut that is too long: between lines, else sentences, else words."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive text of a document. `first` and `last` are its lines, or of a `paged` document both the
    page. `heading` has the headings above, outermost first."""

    document: str
    title: str
    heading: tuple[str, ...]
    text: str
    first: int
    last: int
    paged: bool

    @property
    def place(self) -> str:
        """Document and position as people read them."""
        return f"{self.document}, page {self.first}" if self.paged else f"{self.document}:{self.first}"

    @property
    def likeness(self) -> str:
        """The same for passages with the same words."""
        return hashlib.sha256(" ".join(self.text.lower().split()).encode()).hexdigest()


def split(document: Document, characters: int) -> list[Passage]:
    """The passages of `document`, each of at most so many characters below its headings; of a page's text none goes on
    to the next page. Those with less than :data:`LEAST` characters below their headings are left out."""
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
    """Have `titles` (by level) be those that hold below the heading `block`."""
    for level in [level for level in titles if level >= block.level]:
        del titles[level]
    titles[block.level] = block.text.lstrip("# ")


def _groups(document: Document, characters: int) -> Iterator[list[Block]]:
    """The blocks of each passage: as many as fit; a heading begins a new one when the one before is half full."""
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
    """`text` in pieces of at most so many characters, which together are the text."""
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
