"""Makes tool calls and finish reason of an unstreamed answer the same as those of its stream.

vLLM has one parser for each. If `max_tokens` or a stop string ends the answer within a call, the parser of whole
answers finds no calls, not even completed ones, and returns the raw text; the streaming parser returns what was
generated so far, as OpenAI does.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import FunctionCall
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.outputs import RequestOutput
from vllm.parser.abstract_parser import Parser
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer


def read_as_streamed(serving: OpenAIServingChat) -> None:
    """Makes the chat parse whole answers the way it parses streams."""
    if serving.parser_cls:
        serving.parser_cls = as_streamed(serving.parser_cls)
        serving.chat_completion_full_generator = functools.partial(_answer, serving.chat_completion_full_generator)


def as_streamed(parser: type[Parser]) -> type[Parser]:
    """Returns a subclass of `parser` that parses whole answers to requests with tools token by token."""
    return type(parser.__name__, (_AsStreamed, parser), {})


async def _answer(
    answer: Any,
    request: ChatCompletionRequest,
    result_generator: AsyncIterator[RequestOutput],
    *args: Any,
    **options: Any,
) -> Any:
    """Returns a whole answer whose choices have the finish reasons of a stream."""
    ended: dict[int, str | None] = {}

    async def watched() -> AsyncIterator[RequestOutput]:
        async for result in result_generator:
            ended.update((output.index, output.finish_reason) for output in result.outputs)
            yield result

    response = await answer(request, watched(), *args, **options)
    if isinstance(response, ChatCompletionResponse) and request.tools:
        named = isinstance(request.tool_choice, ChatCompletionNamedToolChoiceParam)
        for choice in response.choices:
            reason = ended.get(choice.index) or "stop"
            choice.finish_reason = (
                "tool_calls" if reason == "stop" and choice.message.tool_calls and not named else reason
            )
    return response


class _AsStreamed:
    """Mixin for vLLM's parsers."""

    _prompt: list[int] | None = None

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        self._prompt = [*prompt_token_ids]
        super().set_prompt_token_ids(prompt_token_ids)  # type: ignore[misc]

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[FunctionCall] | None]:
        """Returns reasoning, text and tool calls of an answer."""
        if not request.tools or request.tool_choice == "none" or not model_output_token_ids:
            parsed: Any = super().parse(model_output, request, enable_auto_tools, model_output_token_ids)  # type: ignore[misc]
            return parsed
        thoughts, text = "", ""
        calls: dict[int, FunctionCall] = {}
        pieces = [*_pieces(self.model_tokenizer, model_output, model_output_token_ids, request)]  # type: ignore[attr-defined]
        for number, (token, piece) in enumerate(pieces, 1):
            finished = number == len(pieces)
            delta = self.parse_delta(piece, [token], request, self._prompt or [], finished=finished)  # type: ignore[attr-defined]
            if delta is None:
                continue
            thoughts += delta.reasoning or ""
            text += delta.content or ""
            for part in delta.tool_calls or ():
                call = calls.setdefault(part.index, FunctionCall(id=part.id, name="", arguments=""))
                if part.function:
                    call.name += part.function.name or ""
                    call.arguments += part.function.arguments or ""
        return thoughts or None, text or None, [call for _, call in sorted(calls.items())]


def _pieces(tokenizer: Any, text: str, tokens: Sequence[int], request: Any) -> Iterator[tuple[int, str]]:
    """Yields an answer's tokens, each with the text that a stream would send with it. The pieces concatenate to `text`,
    which a stop string may have truncated."""
    params = SamplingParams(
        skip_special_tokens=request.skip_special_tokens,
        spaces_between_special_tokens=request.spaces_between_special_tokens,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(
        tokenizer, EngineCoreRequest("", [], None, params, None, 0.0, None, None, None)
    )
    at = 0
    for number, token in enumerate(tokens, 1):
        detokenizer.update([token], False)
        piece = detokenizer.get_next_output_text(finished=False, delta=True)
        end = len(text) if number == len(tokens) else min(at + len(piece), len(text))
        yield token, text[at:end]
        at = end
