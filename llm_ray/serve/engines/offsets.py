"""``text_offset`` of a completion's logprobs: where in the returned text each token begins.

vLLM adds up how long the tokens are as single texts. Those of a prompt may not be in the text (a BOS that the tokenizer
adds), nor have the same length alone (the blank before a SentencePiece token, the parts of a character): from there on
its offsets point elsewhere.
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
    """Have completions, whole and streamed, tell offsets in the text that they return."""
    if tokenizer is not None:
        serving.request_output_to_completion_response = functools.partial(
            _whole, serving.request_output_to_completion_response, tokenizer
        )
        serving.completion_stream_generator = functools.partial(
            _streamed, serving, serving.completion_stream_generator, tokenizer
        )


class Offsets:
    """Where the tokens of one choice begin in its text, prompt first if that is echoed, in characters."""

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
        """Go on with tokens of the answer."""
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
    /,  # vLLM gives the tokenizer by name
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
    """Where a prompt's tokens begin in its text. A token that is not in the text begins where the next one does."""
    if isinstance(tokenizer, TokenizersBackend):
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        if encoded["input_ids"] == [*tokens]:
            offsets, end = [], 0
            for start, stop in encoded["offset_mapping"]:
                if start == stop:  # an added token
                    offsets.append(end)
                else:  # a blank may be left out of the span, and a character's span be that of several tokens
                    offsets.append(min(start, end))
                    end = stop
            return offsets
    detokenizer = _detokenizer(tokenizer, (), False, True)
    offsets, end, read = [], 0, 0
    for token in tokens:  # the text was made of them, or they were cut
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
