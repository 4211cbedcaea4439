"""Token ids of forbidden words (`bad_words`), which engines match against the last tokens of an answer."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Sequence

from vllm.exceptions import VLLMValidationError
from vllm.tokenizers import TokenizerLike

# Text that may precede a word. Tokenizers may merge it with the word or with the word's first letters.
_BEFORE = ("", " ", "\n", "\t", *string.punctuation, *"“‘«„¿¡—–（「《")


def forbidden_tokens(words: Sequence[str], tokenizer: TokenizerLike) -> list[list[int]]:
    """Returns the token sequences that spell a word at the start of an answer, or after a space, a line break or a
    punctuation mark.

    Spaces around a word are ignored. vLLM's own implementation covers a word after a space only if that has as many
    tokens as the word alone, and so misses " Oslo", one token, where "Oslo" is two. Raises VLLMValidationError for a
    word of only whitespace.
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
            tokens = tokens[1:]  # the first token belongs to the preceding text
        found[tuple(tokens)] = None
    return [*found]
