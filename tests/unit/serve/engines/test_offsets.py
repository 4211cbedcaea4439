"""Offsets of completions' tokens, by vLLM's own answers and streams: where each begins in the text that is returned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from llm_ray.serve.engines.offsets import offsets_in_text

TEXTS = ["One two three four five six seven", "the cat sleeps and the dog barks", "one two, one two; the cat"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def with_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")  # noqa: S106


def bytes_of() -> PreTrainedTokenizerFast:
    """Of Llama 3's kind: blanks and parts of characters are in the tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return with_bos(tokenizer)


def pieces_of() -> PreTrainedTokenizerFast:
    """Of Llama 2's kind: a token alone decodes without its blank; a character that it lacks is written in bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    bytes_too = [f"<0x{number:02X}>" for number in range(256)]
    words = [f"▁{word}" for text in TEXTS for word in text.split()]
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=380, special_tokens=[*SPECIAL, *bytes_too]))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []  # the bytes are not special, only in the vocabulary
    return with_bos(Tokenizer.from_str(json.dumps(spec)))


def serving(tokenizer: PreTrainedTokenizerFast) -> OpenAIServingCompletion:
    made = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    made.return_tokens_as_token_ids = made.enable_prompt_tokens_details = made.enable_per_request_metrics = False
    made.enable_force_include_usage, made.system_fingerprint = False, None
    offsets_in_text(made, tokenizer)
    return made


def scored(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[dict[int, Logprob]]:
    return [{token: Logprob(-1.0, 1, tokenizer.decode([token]))} for token in tokens]


class Asked:
    """A request, and what the engine computes for it: for each of its prompts the answers' tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompts: list[str | list[int]], answers: list[str], **asked: Any
    ) -> None:
        self.tokenizer = tokenizer
        self.request = CompletionRequest(
            **{"prompt": prompts, "model": "m", "max_tokens": 16, "logprobs": 1, "echo": True, "n": len(answers)}
            | asked
        )
        add = self.request.add_special_tokens
        self.prompts = [
            tokenizer(one, add_special_tokens=add)["input_ids"] if isinstance(one, str) else one for one in prompts
        ]
        self.texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in prompts]
        blank = tokenizer.backend_tokenizer.normalizer is not None  # it puts one before every text
        answers = [answer.lstrip() if blank else answer for answer in answers]
        self.answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]

    def result(self, number: int, answers: list[tuple[int, str, list[int]]], finished: bool) -> RequestOutput:
        tokens = self.prompts[number]
        before = [None, *scored(self.tokenizer, tokens[1:])]
        outputs = [
            CompletionOutput(
                index, text, some, -1.0, scored(self.tokenizer, some), finish_reason="stop" if finished else None
            )
            for index, text, some in answers
        ]
        return RequestOutput("r", self.texts[number], tokens, before, outputs, finished)

    def decoded(self, number: int, tokens: list[int]) -> str:
        """The answer's text after its prompt, as the engine tells it."""
        before = self.tokenizer.decode(self.prompts[number], skip_special_tokens=True)
        text = self.tokenizer.decode(self.prompts[number] + tokens, skip_special_tokens=True)[len(before) :]
        return text.rstrip("\ufffd")  # parts of a character come with its last

    def whole(self) -> list[tuple[str, list[str], list[int]]]:
        results = [
            self.result(
                number, [(index, self.decoded(number, some), some) for index, some in enumerate(self.answers)], True
            )
            for number in range(len(self.prompts))
        ]
        response = serving(self.tokenizer).request_output_to_completion_response(
            results, self.request, "r", 0, "m", self.tokenizer, RequestResponseMetadata(request_id="r")
        )
        return [
            (choice.text, choice.logprobs.tokens, choice.logprobs.text_offset)
            for choice in response.choices
            if choice.logprobs
        ]

    def streamed(self) -> list[tuple[str, list[str], list[int]]]:
        async def results() -> AsyncIterator[tuple[int, RequestOutput]]:
            for at in range(max(map(len, self.answers))):
                for number in range(len(self.prompts)):
                    for index, some in enumerate(self.answers):
                        if at < len(some):
                            told = self.decoded(number, some[:at])
                            text = self.decoded(number, some[: at + 1])[len(told) :]
                            yield number, self.result(number, [(index, text, some[at : at + 1])], at == len(some) - 1)

        async def read() -> list[str]:
            metadata = RequestResponseMetadata(request_id="r")
            options = {"num_prompts": len(self.prompts), "tokenizer": self.tokenizer, "request_metadata": metadata}
            stream = serving(self.tokenizer).completion_stream_generator(
                self.request, [], results(), "r", 0, "m", **options
            )
            return [event async for event in stream]

        told: dict[int, tuple[str, list[str], list[int]]] = {}
        for event in asyncio.run(read()):
            if event == "data: [DONE]\n\n":
                continue
            (choice,) = json.loads(event.removeprefix("data: "))["choices"]
            text, tokens, offsets = told.get(choice["index"], ("", [], []))
            scores = choice["logprobs"]
            told[choice["index"]] = text + choice["text"], tokens + scores["tokens"], offsets + scores["text_offset"]
        return [told[index] for index in sorted(told)]


@pytest.fixture(params=[bytes_of, pieces_of])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    make: Callable[[], PreTrainedTokenizerFast] = request.param
    return make()


def at_offsets(text: str, offsets: list[int]) -> list[str]:
    """The text of each token."""
    return [text[start:end] for start, end in zip(offsets, [*offsets[1:], len(text)], strict=True)]


@pytest.mark.parametrize("way", [Asked.whole, Asked.streamed])
def test_every_token_is_found_in_the_text_at_its_offset(
    tokenizer: PreTrainedTokenizerFast, way: Callable[[Asked], Any]
) -> None:
    """Of several prompts with two answers each: the BOS that was added is nowhere in the text."""
    choices = way(Asked(tokenizer, ["One two three", "the cat"], [" four five", " sleeps, one"]))
    assert [choice[0] for choice in choices] == [
        "One two three four five",
        "One two three sleeps, one",
        "the cat four five",
        "the cat sleeps, one",
    ]
    for text, tokens, offsets in choices:
        assert (tokens[0], offsets[:2]) == ("<s>", [0, 0])
        assert [found.strip() for found in at_offsets(text, offsets)[1:]] == [token.strip() for token in tokens[1:]]


@pytest.mark.parametrize("way", [Asked.whole, Asked.streamed])
@pytest.mark.parametrize(
    ("prompt", "asked", "begin"),
    [
        ("<s>One two", {}, [0, 0, 3]),  # one added, one of the prompt
        ("<s>One two", {"add_special_tokens": False}, [0, 3]),
        ("One two", {"add_special_tokens": False}, [0]),
        ("One two", {"max_tokens": 0}, [0, 0]),
        ("One two", {"return_token_ids": True}, [0, 0, 0]),  # then vLLM returns the prompt's tokens, not its text
        ("One two", {"return_tokens_as_token_ids": True}, [0, 0]),
    ],
)
def test_a_bos_counts_where_the_text_has_it(
    tokenizer: PreTrainedTokenizerFast,
    way: Callable[[Asked], Any],
    prompt: str,
    asked: dict[str, Any],
    begin: list[int],
) -> None:
    ((text, tokens, offsets),) = way(Asked(tokenizer, [prompt], [" three"], **asked))
    assert offsets[: len(begin)] == begin
    assert len(offsets) == len(tokens)
    assert offsets == sorted(offsets) and offsets[-1] < len(text)


@pytest.mark.parametrize("way", [Asked.whole, Asked.streamed])
def test_a_prompt_of_tokens_is_returned_with_its_bos(
    tokenizer: PreTrainedTokenizerFast, way: Callable[[Asked], Any]
) -> None:
    ((text, tokens, offsets),) = way(Asked(tokenizer, [tokenizer("One two")["input_ids"]], [" three"]))
    assert text.startswith("<s>")
    assert [found.strip() for found in at_offsets(text, offsets)] == [token.strip() for token in tokens]


@pytest.mark.parametrize("way", [Asked.whole, Asked.streamed])
def test_tokens_without_text_of_their_own_take_no_room(
    tokenizer: PreTrainedTokenizerFast, way: Callable[[Asked], Any]
) -> None:
    """Parts of a character, of prompt and answer, and an end that is not shown."""
    asked = Asked(tokenizer, ["the ☂ cat"], [" one ☃ two"])
    asked.answers = [[*asked.answers[0], tokenizer.eos_token_id]]
    ((text, tokens, offsets),) = way(asked)
    assert text == "the ☂ cat one ☃ two"
    assert offsets[-1] == len(text)
    whole = [
        (start, token.strip())
        for start, token in zip(offsets[1:-1], tokens[1:-1], strict=True)
        if "\ufffd" not in token
    ]
    assert [token for start, token in whole if not text[start:].lstrip().startswith(token)] == []


@pytest.mark.parametrize("way", [Asked.whole, Asked.streamed])
def test_without_echo_offsets_are_in_the_answer(
    tokenizer: PreTrainedTokenizerFast, way: Callable[[Asked], Any]
) -> None:
    ((text, tokens, offsets),) = way(Asked(tokenizer, ["One"], [" two three"], echo=False))
    assert offsets[0] == 0
    assert [found.strip() for found in at_offsets(text, offsets)] == [token.strip() for token in tokens]
