"""WikiText (Merity et al. 2016, arXiv:1609.07843): joins its lines into articles and undoes its tokenization."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HEADING = re.compile(r"^\s*(?P<marks>=(?: =)*) (?P<title>.*?) (?P=marks)\s*$")
# The order matters: marks in numbers and around hyphens, then spaces before and inside punctuation.
UNDO = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,;:!?%])(?=\s|$|[\"')\]])"), r"\1"),
    (re.compile(r"([(\[]) "), r"\1"),
    (re.compile(r" ([)\]])"), r"\1"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
    (re.compile(r"([$£€]) (?=\d)"), r"\1"),
    (re.compile(r" (n't|'(?:s|re|ve|ll|d|m))\b"), r"\1"),
    (re.compile(r"s ' "), "s' "),
    (re.compile(r"(?<=\d) ([–/]) (?=\d)"), r"\1"),
]


class Wikitext:
    """Joins the lines (column ``text``) into one row per article, with headings as ``#`` lines and blank lines between
    paragraphs.

    Lines before the first title form a separate article.
    """

    def __call__(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        article: list[str] = []
        for row in rows:
            line = str(row["text"]).strip()
            if not line:
                continue
            heading = HEADING.match(line)
            level = heading["marks"].count("=") if heading else 0
            if level == 1 and article:
                yield {"text": "\n\n".join(article)}
                article = []
            article.append(f"{'#' * level} {detokenize(heading['title'])}" if heading else detokenize(line))
        if article:
            yield {"text": "\n\n".join(article)}


def detokenize(line: str) -> str:
    """Undoes WikiText's tokenization of a line: ``1 @,@ 200 km ( 750 mi ) .`` becomes ``1,200 km (750 mi).``"""
    for pattern, replacement in UNDO:
        line = pattern.sub(replacement, line)
    return line.strip()
