"""Reads HTML as blocks with Beautiful Soup: a page's main text, without menus, scripts and forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ray.documents.document import Block, Document, heading

if TYPE_CHECKING:
    from bs4 import Tag

LEFT_OUT = ("script", "style", "noscript", "template", "svg", "head", "nav", "footer", "aside", "form", "button")
BLOCKS = (
    *("address", "article", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt", "figcaption"),
    *("figure", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section"),
    *("summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"),
)


def read(data: bytes, name: str) -> Document:
    """Returns the document in `data`, decoded as it declares. If a page has a single ``main`` or ``article``, only that
    is read."""
    from bs4 import BeautifulSoup

    page = BeautifulSoup(data, "html.parser")
    title = page.title.get_text(" ", strip=True) if page.title else ""
    for tag in page.find_all(LEFT_OUT):
        tag.decompose()
    roots = page.find_all("main") or page.find_all("article")
    root = roots[0] if len(roots) == 1 else page
    blocks = tuple(_blocks(root, root.sourceline or 1))
    title = title or next((block.text.lstrip("# ") for block in blocks if block.level), Path(name).stem)
    return Document(name, title, blocks)


def _blocks(tag: Tag, line: int) -> Iterator[Block]:
    """Yields the blocks in `tag`, which begins on `line`: texts between the boundaries of block elements."""
    from bs4 import Tag
    from bs4.element import PreformattedString

    inline: list[str] = []
    at = line
    for child in tag.children:
        if not isinstance(child, Tag):
            if not isinstance(child, PreformattedString):  # comments and the like
                inline.append(str(child))
            continue
        if child.name == "br":
            inline.append("\n")
            continue
        begins = child.sourceline or at
        if child.name not in BLOCKS and not child.find(BLOCKS):
            at = at if "".join(inline).strip() else begins
            inline.append(child.get_text())
            continue
        yield from _paragraph(inline, at)
        inline, at = [], begins
        yield from _block(child, begins)
    yield from _paragraph(inline, at)


def _block(tag: Tag, line: int) -> Iterator[Block]:
    if tag.name == "pre":
        text = tag.get_text().strip("\n").rstrip()
        if text:
            yield Block(f"```\n{text}\n```", line, line)
    elif len(tag.name) == 2 and tag.name[0] == "h" and tag.name[1].isdigit():
        if text := tag.get_text(" ", strip=True):
            yield heading(int(tag.name[1]), text, line)
    elif tag.name == "tr":
        cells = [" ".join(cell.get_text(" ").split()) for cell in tag.find_all(("td", "th"), recursive=False)]
        if any(cells):
            yield Block(f"| {' | '.join(cells)} |", line, line)
    elif tag.name in ("li", "dt", "dd"):
        inside = list(_blocks(tag, line))
        for number, block in enumerate(inside):
            yield block if number or block.level else Block(f"- {block.text}", block.at, block.last)
    else:
        yield from _blocks(tag, line)


def _paragraph(parts: list[str], at: int) -> Iterator[Block]:
    text = "\n".join(" ".join(line.split()) for line in _lines(parts)).strip()
    if text:
        yield Block(text, at, at)


def _lines(parts: list[str]) -> list[str]:
    """Splits the text of `parts` into lines; only a ``br``, a part of its own, ends a line."""
    lines = [""]
    for part in parts:
        if part == "\n":
            lines.append("")
        else:
            lines[-1] += part
    return lines
