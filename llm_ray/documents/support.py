"""Tells whether an answer is supported by its passage, by the share of its words that occur there.

This compares words, not meaning: it detects what a model invents or takes from elsewhere, but not wrong combinations of
the passage's own words.
"""

from __future__ import annotations

import re
import unicodedata

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
"""A word, or a single Chinese or Japanese character, since these languages do not separate words."""
SHORTEST, LONGEST = 4, 6
"""Minimum letters of a word to count; maximum letters of the prefix that is compared, since endings vary."""


def support(answer: str, passage: str) -> float:
    """Returns the share of the answer's words that occur in the passage, 0 to 1; 0 if the answer has a number that does
    not.

    Short words count only if there are no longer ones.
    """
    known = set(words(passage))
    prefixes = {word[:letters] for word in known for letters in range(SHORTEST, LONGEST + 1)} | known
    given = words(answer)
    if any(word not in known for word in given if any(map(str.isdigit, word))):
        return 0.0
    counted = [word for word in given if len(word) >= SHORTEST or not word.isascii() or word.isdigit()] or given
    return sum(_prefix(word) in prefixes for word in counted) / len(counted) if counted else 0.0


def _prefix(word: str) -> str:
    return word[: max(SHORTEST, min(LONGEST, len(word) - 2))]


def words(text: str) -> list[str]:
    """Returns the words of `text`, case-folded and without punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())
