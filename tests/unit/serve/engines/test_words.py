"""The tokens of forbidden words, in tokenizers of the kinds that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import get_tokenizer

from llm_ray.serve.engines.words import forbidden_tokens


def spelled(words: list[str], tokenizer: Any) -> set[tuple[str, ...]]:
    return {tuple(tokenizer.convert_ids_to_tokens(ids)) for ids in forbidden_tokens(words, tokenizer)}


def merging(
    *merges: tuple[str, str], before: pre_tokenizers.PreTokenizer, decoder: decoders.Decoder
) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, and what these merges make of them."""
    letters = dict.fromkeys("".join(a + b for a, b in merges) + 'OsloParis ."(\nĠĊ▁')
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[*merges]))
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_blank_may_belong_to_the_first_token_and_make_it_longer(smollm2: Path) -> None:
    """SmolLM2's, of GPT-2's kind: vLLM's own way forbids but the first of these."""
    tokenizer = get_tokenizer(str(smollm2))
    assert spelled(["Oslo"], tokenizer) == {("Os", "lo"), ("ĠOslo",)}
    assert spelled(["Paris", "new york"], tokenizer) == {
        ("Paris",),
        ("ĠParis",),
        ("new", "Ġy", "ork"),
        ("Ġnew", "Ġy", "ork"),
    }
    assert spelled([" Oslo\n"], tokenizer) == spelled(["Oslo"], tokenizer), "blanks around it do not count"
    own = SamplingParams(bad_words=["Oslo"])
    own.update_from_tokenizer(tokenizer)
    assert own.bad_words_token_ids == [tokenizer.encode("Oslo")], "when vLLM knows both, ours can go"


def test_a_punctuation_mark_may_belong_to_the_first_token() -> None:
    """As in tokenizers of Llama 3 and Qwen."""
    splits = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    merges = [("(", "O"), ("(O", "s"), ("l", "o"), ("s", "lo"), ("Ġ", "O")]
    tokenizer = merging(*merges, before=splits, decoder=decoders.ByteLevel())
    assert spelled(["Oslo"], tokenizer) == {("O", "slo"), ("ĠO", "slo"), ("(Os", "lo")}


def test_a_word_at_the_beginning_of_a_line_where_every_word_begins_with_a_blank() -> None:
    """As in tokenizers of SentencePiece, which put a blank before a text."""
    merges = [("▁", "O"), ("s", "l"), ("O", "sl"), ("▁O", "sl")]
    tokenizer = merging(
        *merges,
        before=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    )
    assert spelled(["Oslo"], tokenizer) == {("▁Osl", "o"), ("Osl", "o")}


def test_a_word_of_blanks_is_refused(smollm2: Path) -> None:
    with pytest.raises(VLLMValidationError, match="only spaces") as refused:
        forbidden_tokens(["Oslo", " \n"], AutoTokenizer.from_pretrained(smollm2))
    assert refused.value.parameter == "bad_words"
