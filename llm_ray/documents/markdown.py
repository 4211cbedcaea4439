"""Reads Markdown as blocks: CommonMark with tables, parsed by markdown-it. Blocks keep their source lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llm_ray.documents.document import Block, Document, heading

FRONT_MATTER = re.compile(r"---[ \t]*\n.*?^(---|\.\.\.)[ \t]*$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def read(text: str, name: str) -> Document:
    """Returns the document in `text`, without front matter (``---``)."""
    if front := FRONT_MATTER.match(text):
        text = "\n" * front[0].count("\n") + text[front.end() :]  # keep line numbers
    blocks = tuple(_blocks(text))
    title = next((block.text.lstrip("# ") for block in blocks if block.level), Path(name).stem)
    return Document(name, title, blocks)


def _blocks(text: str) -> Iterator[Block]:
    from bs4 import BeautifulSoup
    from markdown_it import MarkdownIt

    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.level or token.map is None or token.type == "hr":
            continue
        first, end = token.map
        if token.type == "heading_open":
            yield heading(int(token.tag[1]), tokens[number + 1].content, first + 1)
            continue
        written = "\n".join(lines[first:end])
        if token.type == "html_block":
            written = BeautifulSoup(COMMENT.sub("", written), "html.parser").get_text(" ", strip=True)
        if written.strip():
            written = written.rstrip()
            yield Block(written, first + 1, first + 1 + written.count("\n"))
