"""Greedy answers of a causal model to conversations, in batches, as its chat template puts the question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_ray.data.encode import end_of_turn
from llm_ray.data.formats import Conversation


def question_and_reference(row: Conversation) -> tuple[Conversation, str] | None:
    """The conversation up to its last answer, and that answer's text; None when it does not end in one of text."""
    last = row.messages[-1]
    if last["role"] != "assistant" or not last.get("content"):
        return None
    return Conversation(row.messages[:-1], row.tools), str(last["content"])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's own, the tokenizer's EOS, and the end of a turn, which training taught."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends.add(end_of_turn(tokenizer))
    return sorted(end for end in ends if end is not None)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Conversation], max_new_tokens: int, batch_size: int
) -> Iterator[str]:
    """The model's answers, in the order of `questions`; decoding is greedy, at most `max_new_tokens` long."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    for start in range(0, len(questions), batch_size):
        prompts = [
            tokenizer.apply_chat_template(q.messages, tools=q.tools, add_generation_prompt=True, tokenize=True, return_dict=False)
            for q in questions[start : start + batch_size]
        ]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, generation_config=settings)
        yield from (text.strip() for text in tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
