"""Conversations and texts made into tokens and labels.

What the model is trained on is what it meets in serving, by construction. For each of the assistant's answers the chat
template is asked for the prompt of that answer (``add_generation_prompt=True``, as a server does), and for the
conversation up to its end; the tokens of the prompt are not supervised, those that follow are, up to and including the
token that ends a turn. If the prompt of the next answer goes on from these very tokens, it is added to the sequence.
If it does not (templates that take the reasoning out of earlier answers, or move tools behind the last question), the
next answer begins a sequence of its own, which again starts with the very tokens a server would send. So no marks such
as ``{% generation %}`` are needed, and templates that have them work as well.

Labels are aligned with the tokens (``labels[t]`` is ``input_ids[t]`` or -100; the shift by one is the loss's), and the
first label of a sequence is always -100: nothing is predicted from a neighbour in the same pack.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from llm_ray.data.formats import Conversation, Message, Text
from llm_ray.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not supervised

# The form in which Qwen 2.5 and the Hermes models write tools and calls; vLLM's tool parser `hermes` reads it.
TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
TOOL_CALL = "<tool_call>\n{call}\n</tool_call>"
TOOL_RESPONSE = "<tool_response>\n{content}\n</tool_response>"


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens and their labels, of the same length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(slots=True)
class Encoded:
    """A row's sequences (none: nothing of it is supervised), and what it lost."""

    sequences: list[Sequence] = field(default_factory=list)
    longest: int = 0
    """Tokens of the whole row, before anything was cut."""
    truncated: bool = False
    """Whether answers at the end were cut because they did not fit."""


@dataclass(slots=True)
class _Answer:
    """An answer on its way from text to tokens."""

    prompt: str
    whole: str
    cut: bool
    """Whether the template ends the answer without an end-of-turn token, so that one is put after `whole`."""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends an assistant's turn under the tokenizer's chat template.

    Serving has to stop at it: it belongs into the generation config's ``eos_token_id``. Raises :class:`ModelError` if
    there is no chat template, or neither the template nor the tokenizer has such a token.
    """
    return ChatEncoder(tokenizer, max_length=1).end


class ChatEncoder:
    """Encodes conversations; see the module's text for how."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template, so that a conversation cannot be written for it: set "
                "model.chat_template to a Jinja file with one (an instruct model's tokenizer has one of its own), or learn plain text with "
                "tuning.objective pretrain"
            )
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        self.end, self.ending = self._end_of_turn()
        self.native_tools = self._native_tools()

    def encode(self, conversations: list[Conversation]) -> list[Encoded | DataError]:
        """One result a conversation, in order; an error (its place is not known here) where the template refuses it."""
        answers = [self._answers(self.adapt(c)) for c in conversations]
        texts = [text for row in answers if isinstance(row, list) for answer in row for text in (answer.prompt, answer.whole)]
        tokens = iter(self._tokens(texts))
        return [self._assemble([(a, next(tokens), next(tokens)) for a in row]) if isinstance(row, list) else row for row in answers]

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool) -> str:
        """The conversation as text; with `prompt`, as the prompt of the assistant's next answer."""
        return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))

    def adapt(self, conversation: Conversation) -> Conversation:
        """The conversation in roles that the template knows.

        Unchanged if the template writes tools, calls and results itself. Otherwise the tools are described in the system
        message, calls become the assistant's words, and results the user's.
        """
        has_tools = conversation.tools or any(m["role"] == "tool" or "tool_calls" in m for m in conversation.messages)
        if self.native_tools or not has_tools:
            return conversation
        rest = conversation.messages
        messages: list[Message] = []
        if conversation.tools:
            system = TOOLS.format(tools="\n".join(json.dumps(t, ensure_ascii=False) for t in conversation.tools))
            if rest[0]["role"] == "system":
                system = f"{rest[0]['content']}\n\n{system}"
                rest = rest[1:]
            messages.append({"role": "system", "content": system})
        for message in rest:
            role, content = message["role"], message["content"]
            if role == "tool":
                role, content = "user", TOOL_RESPONSE.format(content=content)
                if messages and messages[-1]["role"] == "user":
                    messages[-1]["content"] += "\n" + content
                    continue
            elif "tool_calls" in message:
                calls = [TOOL_CALL.format(call=json.dumps(c["function"], ensure_ascii=False)) for c in message["tool_calls"]]
                content = "\n".join(part for part in (content, *calls) if part)
            messages.append({"role": role, "content": content})
        return Conversation(messages, None)

    def _answers(self, conversation: Conversation) -> list[_Answer] | DataError:
        messages, answers = conversation.messages, []
        for number, message in enumerate(messages):
            # An answer to nothing cannot be asked for, and an empty one teaches to say nothing.
            if message["role"] != "assistant" or not number or not (message["content"].strip() or message.get("tool_calls")):
                continue
            try:
                prompt = self.render(messages[:number], conversation.tools, prompt=True)
                whole = self.render(messages[: number + 1], conversation.tools, prompt=False)
            except Exception as error:  # a template is a program of the model's: it raises what it likes
                return DataError(f"the chat template refuses the row: {error}")
            if not whole.startswith(prompt):
                return DataError(f"turn {number + 1}: {_not_a_prefix(prompt, whole)}")
            answers.append(_Answer(prompt, whole.removesuffix(self.ending), True) if self.ending else _Answer(prompt, whole, False))
        return answers

    def _assemble(self, answers: list[tuple[_Answer, list[int], list[int]]]) -> Encoded:
        encoded = Encoded()
        ids: list[int] = []
        labels: list[int] = []
        for answer, prompt, whole in answers:
            # If a token lies across the boundary, the answer is tokenized by itself: the server sends the prompt as it is.
            together = whole[: len(prompt)] == prompt
            after = whole[len(prompt) :] if together else self._tokens([answer.whole[len(answer.prompt) :]])[0]
            supervised = self._ended(after, answer.cut)
            length = len(prompt) + len(supervised)
            encoded.longest = max(encoded.longest, length)
            # Once an answer is cut, so are those after it: they may refer to it.
            encoded.truncated |= length > self.max_length
            if encoded.truncated:
                continue
            if ids and prompt[: len(ids)] != ids:
                encoded.sequences.append(Sequence(ids, labels))
                ids, labels = [], []
            labels = [*labels, *[IGNORED] * (len(prompt) - len(ids)), *supervised]
            ids = [*prompt, *supervised]
        if ids:
            encoded.sequences.append(Sequence(ids, labels))
        return encoded

    def _ended(self, answer: list[int], cut: bool) -> list[int]:
        """The answer's tokens up to its end-of-turn token; templates put line breaks and more after it, which no one generates."""
        if cut:
            return [*answer, self.end]
        if self.end in answer:
            return answer[: len(answer) - answer[::-1].index(self.end)]
        # A call of a tool may end in another token than an answer in words does.
        last = max((i for i, token in enumerate(answer) if token in self.special), default=None)
        if last is not None and not self.tokenizer.decode(answer[last + 1 :]).strip():
            return answer[: last + 1]
        return [*answer, self.end]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # The template writes the special tokens; verbose=False: rows longer than the model's context are cut later.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"] if texts else []

    def _end_of_turn(self) -> tuple[int, str]:
        """The end-of-turn token, and the text to replace by it if the template ends a turn without any special token."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            prompt, whole = self.render([question], None, prompt=True), self.render([question, answer], None, prompt=False)
        except Exception as error:
            raise ModelError(f"the chat template of {self.tokenizer.name_or_path} fails on a question and an answer: {error}") from error
        if not whole.startswith(prompt) or "answer" not in whole[len(prompt) :]:
            raise ModelError(f"the chat template of {self.tokenizer.name_or_path} cannot be trained on: {_not_a_prefix(prompt, whole)}")
        ending = whole[len(prompt) :].rpartition("answer")[2]
        added = self.tokenizer.added_tokens_decoder
        ids = self._tokens([ending])[0]
        for ends in (self.special, {i for i, token in added.items() if token.content.strip()}):
            found = next((i for i in ids if i in ends), None)
            if found is not None:
                return found, ""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"neither the chat template nor the tokenizer of {self.tokenizer.name_or_path} has a token that ends a turn: set "
                "model.chat_template to one that does"
            )
        return self.tokenizer.eos_token_id, ending

    def _native_tools(self) -> bool:
        """Whether the template writes tools, calls and their results by itself: tried out."""
        parameters = {"type": "object", "properties": {}}
        tool = {"type": "function", "function": {"name": "probe_tool", "description": "tries out", "parameters": parameters}}
        call = {"id": "call00000", "type": "function", "function": {"name": "probe_call", "arguments": {"key": "probe_argument"}}}
        messages: list[Message] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "probe_result", "tool_call_id": "call00000", "name": "probe_call"},
            {"role": "assistant", "content": "answer"},
        ]
        try:
            text = self.render(messages, [tool], prompt=False)
        except Exception:  # the template's way to say no
            return False
        return all(probe in text for probe in ("probe_tool", "probe_call", "probe_argument", "probe_result"))


def _not_a_prefix(prompt: str, whole: str) -> str:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
    here = slice(max(0, same - 20), same + 40)
    return (
        f"the template's prompt for an answer ends in {prompt[here]!r}, but the conversation with the answer goes on as {whole[here]!r} "
        "there, so that serving would not meet what was learnt; set model.chat_template to a template in which the prompt is the beginning "
        "of the answered conversation"
    )


class TextEncoder:
    """Encodes plain text: every token is learnt, an end-of-text token after the last, cut into pieces of `max_length`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token) by which to learn where a text "
                "ends: name another in model.tokenizer"
            )
        self.tokenizer, self.max_length, self.end = tokenizer, max_length, tokenizer.eos_token_id

    def encode(self, texts: list[Text]) -> list[Encoded | DataError]:
        """One result a text, in order."""
        # With the special tokens the tokenizer puts around a text (a BOS, where the model was trained with one).
        tokens = self.tokenizer([t.text for t in texts], return_attention_mask=False, verbose=False)["input_ids"] if texts else []
        return [self._pieces(ids) if text.text.strip() else Encoded() for text, ids in zip(texts, tokens, strict=True)]

    def _pieces(self, ids: list[int]) -> Encoded:
        if ids[-1:] != [self.end]:
            ids = [*ids, self.end]
        starts = list(range(0, len(ids), self.max_length))
        if len(ids) - starts[-1] == 1 and len(starts) > 1:
            starts[-1] -= 1  # a last piece of one token has nothing to predict it from
        pieces = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        return Encoded([Sequence(p, [IGNORED, *p[1:]]) for p in pieces if len(p) > 1], longest=len(ids))
