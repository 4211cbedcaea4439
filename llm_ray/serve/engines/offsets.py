"""Corrects ``text_offset`` in a completion's logprobs: the position in the returned text at which each token begins.

vLLM sums the lengths of the tokens decoded one by one. Prompt tokens may be missing from the text (a BOS added by the
tokenizer) or have another length alone (the space before a SentencePiece token, parts of a character), which makes all
later offsets wrong.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from transformers import TokenizersBackend
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer


def offsets_in_text(serving: OpenAIServingCompletion, tokenizer: TokenizerLike | None) -> None:
    """Makes completions, whole and streamed, report offsets into the text that they return."""
    if tokenizer is not None:
        serving.request_output_to_completion_response = functools.partial(
            _whole, serving.request_output_to_completion_response, tokenizer
        )
        serving.completion_stream_generator = functools.partial(
            _streamed, serving, serving.completion_stream_generator, tokenizer
        )


class Offsets:
    """Offsets in characters of one choice's tokens in its text, which begins with the prompt if that is echoed."""

    def __init__(
        self, tokenizer: TokenizerLike, request: CompletionRequest, prompt: str | None, tokens: Sequence[int]
    ) -> None:
        # With return_token_ids vLLM echoes the prompt's tokens without its text.
        echoed = (prompt or "") if request.echo and not request.return_token_ids else ""
        self.found = _of_prompt(tokenizer, echoed, tokens, request.add_special_tokens) if request.echo else []
        self._before = len(echoed)
        self._answer = _detokenizer(
            tokenizer, tokens, request.skip_special_tokens, request.spaces_between_special_tokens
        )

    def add(self, tokens: Sequence[int]) -> None:
        """Continues with tokens of the answer."""
        for token in tokens:
            self.found.append(self._before + len(self._answer.output_text))
            self._answer.update([token], False)


def _whole(
    answer: Any,
    tokenizer: TokenizerLike,
    results: list[RequestOutput],
    request: CompletionRequest,
    /,
    *args: Any,
    **options: Any,
) -> CompletionResponse:
    response: CompletionResponse = answer(results, request, *args, **options)
    outputs = [(result, output) for result in results for output in result.outputs]
    for choice, (result, output) in zip(response.choices, outputs, strict=True):
        if choice.logprobs:
            offsets = Offsets(tokenizer, request, result.prompt, result.prompt_token_ids or ())
            offsets.add(output.token_ids)
            choice.logprobs.text_offset = offsets.found[: len(choice.logprobs.tokens)]
    return response


async def _streamed(
    serving: OpenAIServingCompletion,
    stream: Any,
    tokenizer: TokenizerLike,
    request: CompletionRequest,
    inputs: list[Any],
    results: AsyncIterator[tuple[int, RequestOutput]],
    /,  # vLLM passes the tokenizer by keyword
    *args: Any,
    **options: Any,
) -> AsyncGenerator[str, None]:
    choices: dict[int, Offsets] = {}

    async def watched() -> AsyncIterator[tuple[int, RequestOutput]]:
        async for number, result in results:
            for output in result.outputs:
                index = output.index + number * (request.n or 1)
                if index not in choices:
                    prompt = serving._extract_prompt_text(inputs[number]) if result.prompt is None else result.prompt
                    choices[index] = Offsets(tokenizer, request, prompt, result.prompt_token_ids or ())
                choices[index].add(output.token_ids)
            yield number, result

    if request.logprobs is None:
        async for event in stream(request, inputs, results, *args, **options):
            yield event
        return
    async for event in stream(request, inputs, watched(), *args, **options):
        if '"text_offset":' not in event:
            yield event
            continue
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk["choices"]:
            if logprobs := choice.get("logprobs"):
                found, count = choices[choice["index"]].found, len(logprobs["tokens"])
                logprobs["text_offset"], found[:count] = found[:count], []
        yield f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _of_prompt(tokenizer: TokenizerLike, text: str, tokens: Sequence[int], add_special_tokens: bool) -> list[int]:
    """Returns the offsets of a prompt's tokens in its text. A token missing from the text gets the offset of the next
    one."""
    if isinstance(tokenizer, TokenizersBackend):
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        if encoded["input_ids"] == [*tokens]:
            offsets, end = [], 0
            for start, stop in encoded["offset_mapping"]:
                if start == stop:  # an added token
                    offsets.append(end)
                else:  # spans may exclude a space, and tokens of one character share its span
                    offsets.append(min(start, end))
                    end = stop
            return offsets
    detokenizer = _detokenizer(tokenizer, (), False, True)
    offsets, end, read = [], 0, 0
    for token in tokens:  # the text was decoded from them, or they were truncated
        offsets.append(end)
        detokenizer.update([token], False)
        piece = detokenizer.output_text[read:]
        read += len(piece)
        if text.startswith(piece, end):
            end += len(piece)
    return offsets


def _detokenizer(tokenizer: TokenizerLike, before: Sequence[int], skip_special_tokens: bool, spaces: bool) -> Any:
    params = SamplingParams(skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces)
    return IncrementalDetokenizer.from_new_request(
        tokenizer, EngineCoreRequest("", [*before], None, params, None, 0.0, None, None, None)
    )
