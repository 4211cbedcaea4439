"""Whether an answer is supported by its passage: how many of its words stand there.

A check of words, not of sense: it finds what a model has made up or has from elsewhere, but not an answer that puts the
passage's own words together wrongly.
"""

from __future__ import annotations

import re
import unicodedata

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
"""A word; of Chinese and Japanese, which part none, a character."""
SHORTEST, LONGEST = 4, 6
"""Letters of a word from which on it counts; and those of its beginning that are compared, because endings differ."""


def support(answer: str, passage: str) -> float:
    """The share of the answer's words that occur in the passage, 0 to 1; 0 where it has a number that does not.

    Short words count only where there are no others.
    """
    there = set(words(passage))
    beginnings = {word[:letters] for word in there for letters in range(SHORTEST, LONGEST + 1)} | there
    said = words(answer)
    if any(word not in there for word in said if any(map(str.isdigit, word))):
        return 0.0
    weighty = [word for word in said if len(word) >= SHORTEST or not word.isascii() or word.isdigit()] or said
    return sum(_beginning(word) in beginnings for word in weighty) / len(weighty) if weighty else 0.0


def _beginning(word: str) -> str:
    return word[: max(SHORTEST, min(LONGEST, len(word) - 2))]


def words(text: str) -> list[str]:
    """The words of `text`, without case and punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())
