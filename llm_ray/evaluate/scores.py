"""Scores a generated answer against the reference: exact match and token F1, as in SQuAD.

Rajpurkar et al. 2016 (arXiv:1606.05250): both texts in lower case, without punctuation and English articles.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> list[str]:
    """Returns the words that are compared."""
    kept = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text.casefold())
    return _ARTICLE.sub(" ", kept).split()


def exact_match(answer: str, reference: str) -> float:
    """Returns 1.0 if the normalized texts are equal, else 0.0."""
    return float(normalized(answer) == normalized(reference))


def token_f1(answer: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall over words, from 0 to 1."""
    given, wanted = normalized(answer), normalized(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
