"""Greedy, batched generation of answers to conversations, with the model's chat template."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_ray.data.encode import end_of_turn
from llm_ray.data.formats import Conversation
from llm_ray.errors import ModelError
from llm_ray.models.chat import ChatTemplate, text_of


def question_and_reference(row: Conversation) -> tuple[Conversation, str] | None:
    """Splits a conversation into everything before its last answer, and that answer's text; None if it does not end in
    a supervised text answer."""
    last = row.messages[-1]
    if last["role"] != "assistant" or not last.get("content") or last.get("weight") == 0:
        return None
    return Conversation(row.messages[:-1], row.tools), text_of(last["content"])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids that end an answer: the model's own, the tokenizer's EOS, and the trained end of turn."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(ModelError):  # its template cannot be trained on: it learned plain text
            ends.add(end_of_turn(tokenizer))
    return sorted(end for end in ends if end is not None)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[str]:
    """Yields the model's answers in the order of `questions`, decoded greedily with at most `max_new_tokens` tokens."""
    pad = tokenizer.pad_token_id or 0  # any token works, since it is masked
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=pad,
        use_cache=True,
    )
    template = ChatTemplate(tokenizer)
    for start in range(0, len(questions), batch_size):
        prompts = [
            tokenizer(template.render(q.messages, q.tools, prompt=True), add_special_tokens=False)["input_ids"]
            for q in questions[start : start + batch_size]
        ]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, generation_config=settings)
        yield from (text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True))
