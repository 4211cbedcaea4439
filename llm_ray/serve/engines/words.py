"""Forbidden words (`bad_words`) as token ids, which engines compare with an answer's last tokens."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Sequence

from vllm.exceptions import VLLMValidationError
from vllm.tokenizers import TokenizerLike

# What a word may follow. Tokenizers join it with the word, or with its first letters, where their vocabulary has such a
# token.
_BEFORE = ("", " ", "\n", "\t", *string.punctuation, *"“‘«„¿¡—–（「《")


def forbidden_tokens(words: Sequence[str], tokenizer: TokenizerLike) -> list[list[int]]:
    """The token sequences that spell a word: at the beginning of an answer, and after a blank, a line break or a
    punctuation mark.

    Blanks around a word do not count. vLLM's own way knows a word after a blank only where that takes as many tokens as
    the word alone, and so misses " Oslo", one token, where "Oslo" is two. Raises VLLMValidationError for a word of
    blanks alone.
    """
    if not all(map(str.strip, words)):
        raise VLLMValidationError("a word of only spaces cannot be forbidden", parameter="bad_words")
    spelled = itertools.chain.from_iterable(_spellings(word.strip(), tokenizer) for word in words)
    return [list(tokens) for tokens in dict.fromkeys(spelled) if tokens]


@functools.lru_cache(maxsize=1024)
def _spellings(word: str, tokenizer: TokenizerLike) -> list[tuple[int, ...]]:
    found: dict[tuple[int, ...], None] = {}
    for before in _BEFORE:
        tokens = tokenizer.encode(before + word, add_special_tokens=False)
        while len(tokens) > 1 and word in tokenizer.decode(tokens[1:]):
            tokens = tokens[1:]  # the first belongs to what comes before
        found[tuple(tokens)] = None
    return [*found]
