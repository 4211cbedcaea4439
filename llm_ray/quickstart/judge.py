"""Judges whether an answer contains the expected fact.

>>> is_right("You have 47 days.", ["47 days"])
True
>>> is_right("30 days, at most 47 days.", ["47 days"])
False
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# E-mail addresses and numbers (also times and decimals) stay whole: 47 does not match in 147, nor 2.3 in 12.35.
_TOKEN = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+|\d+(?:[.:,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*|[%€]")
_REACH = 3  # a negation within this many tokens before a key negates it


def is_right(answer: str, expect: Sequence[str]) -> bool:
    """Returns whether every item of `expect` is in `answer`; an item may list alternatives, separated by `|`.

    Strict: matches only whole words and numbers that are not negated. If numbers or an address are expected, an answer
    with any other is wrong, so listing several guesses does not help.
    """
    words = _tokens(answer)
    wanted = [[_tokens(alternative) for alternative in item.split("|")] for item in expect]
    values = {token for item in wanted for alternative in item for token in alternative if _is_value(token)}
    if values and any(_is_value(token) and token not in values for token in words):
        return False
    return all(any(_contains(words, alternative) for alternative in item) for item in wanted)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def _is_value(token: str) -> bool:
    return token[0].isdigit() or "@" in token


def _contains(words: list[str], key: list[str]) -> bool:
    return any(
        words[at : at + len(key)] == key
        and not any(word in ("not", "never") or word.endswith("n't") for word in words[max(0, at - _REACH) : at])
        for at in range(len(words) - len(key) + 1)
    )
