"""Encodes conversations and texts as tokens and labels.

By construction, training uses the same prompts as serving. For each of the assistant's answers the chat template is
asked for the prompt of that answer (``add_generation_prompt=True``, as a server does), and for the conversation up to
its end; the tokens of the prompt are not supervised, those that follow are, up to and including the token that ends a
turn. If the prompt of the next answer goes on from these very tokens, it is added to the sequence. If it does not
(templates that take the reasoning out of earlier answers, or move tools behind the last question), the next answer
begins a sequence of its own, which again starts with the very tokens a server would send. So no marks such as ``{%
generation %}`` are needed, and templates that have them work as well.

Labels are aligned with the tokens (``labels[t]`` is ``input_ids[t]`` or -100; the shift by one is the loss's), and the
first label of a sequence is always -100: nothing is predicted from a neighbour in the same pack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.formats import Content, Conversation, Pair, Text
from llm_ray.errors import DataError, ModelError
from llm_ray.models.chat import ChatTemplate, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not supervised
NO_ANSWER = "nothing to learn in it (no answer, or an empty one)"
TOO_LONG = "the first answer does not end within data.max_length"
PAIR_TOO_LONG = "an answer of the pair does not end within data.max_length"
SAME = "both answers of the pair are the same"
MARK = "\ufdd0"  # no character of any text: Unicode keeps it for programs


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens and their labels, of the same length. Of a pair: the row with the chosen answer, then the one with the
    rejected answer, each with its prompt."""

    input_ids: list[int]
    labels: list[int]
    chosen: int = 0
    """Of a pair, tokens of the row with the chosen answer."""

    def rows(self) -> list[Sequence]:
        """What the model sees as rows of their own: this one, or the two of a pair."""
        if not self.chosen:
            return [self]
        return [
            Sequence(self.input_ids[part], self.labels[part])
            for part in (slice(0, self.chosen), slice(self.chosen, None))
        ]


@dataclass(slots=True)
class Encoded:
    """A row's sequences (none: nothing of it is supervised), and what it lost."""

    sequences: list[Sequence] = field(default_factory=list)
    longest: int = 0
    """Tokens of the whole row, before anything was cut."""
    truncated: bool = False
    """Whether answers at the end were cut because they did not fit."""
    lost: str = field(default="", compare=False)
    """Why nothing of it is learnt; empty where something is."""


@dataclass(slots=True)
class _Answer:
    """An answer on its way from text to tokens."""

    prompt: str
    whole: str
    cut: bool
    """Whether the template ends the answer without an end-of-turn token, so that one is put after `whole`."""


def encoder_for(
    conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[Any]], list[Encoded | DataError]]:
    """What makes tokens of what the conf's objective reads: of a list of such contents, one result each, in order; an
    error (its place is not known here) where the chat template refuses one.

    Raises ModelError for a tokenizer or chat template that cannot be trained with.
    """
    if conf.objective.reads == "texts":
        return TextEncoder(tokenizer, conf.data.max_length).encode
    chat = ChatEncoder(tokenizer, conf.data.max_length, conf.model.chat_template)
    return PairEncoder(chat).encode if conf.objective.reads == "pairs" else chat.encode


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends an assistant's turn under the tokenizer's chat template.

    Serving has to stop at it: it belongs into the generation config's ``eos_token_id``. Raises :class:`ModelError` if
    there is no chat template, or neither the template nor the tokenizer has such a token.
    """
    return ChatEncoder(tokenizer, max_length=1).end


class SpecialTokens:
    """The tokenizer's special tokens as rows may have them in their texts: ``<|im_end|>`` in a user's question ends its
    turn.

    Raises ModelError, with `escape`, for a tokenizer that cannot tell where its tokens stand in a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, escape: bool) -> None:
        written = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1}, key=len
        )
        self._pattern = re.compile("|".join(map(re.escape, reversed(written)))) if written else None
        self._edges = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
        if escape and written:
            (ids,) = (
                tokens_of(tokenizer, [self._broken(f"a {written[0]} b")], add_special_tokens=False)
                if tokenizer.is_fast
                else ([],)
            )
            if written[0] not in tokenizer.decode(ids, skip_special_tokens=True):
                raise ModelError(
                    "data.special_tokens_in_text: escape is not supported with the tokenizer of "
                    f"{tokenizer.name_or_path}: use fail or keep"
                )

    def found(self, content: Content) -> str:
        """The first special token in the texts; empty where there is none. A BOS before a plain text and an EOS after
        it do not count."""
        if not self._pattern:
            return ""
        if isinstance(content, Pair):
            return self.found(content.chosen) or self.found(content.rejected)
        if isinstance(content, Text):
            return match[0] if (match := self._pattern.search(self._parts(content.text)[1])) else ""
        return next(
            (match[0] for text in _texts([content.messages, content.tools]) if (match := self._pattern.search(text))),
            "",
        )

    def escaped(self, content: Content) -> Content:
        """The same with special tokens broken by a mark, for :func:`tokens_of` to take out: they become tokens of
        ordinary text."""
        if isinstance(content, Pair):
            return Pair(self._escaped(content.chosen), self._escaped(content.rejected), content.shared)
        if isinstance(content, Text):
            before, text, after = self._parts(content.text)
            return Text(before + self._broken(text) + after)
        return self._escaped(content)

    def _escaped(self, content: Conversation) -> Conversation:
        return Conversation(_changed(content.messages, self._broken), _changed(content.tools, self._broken))

    def _broken(self, text: str) -> str:
        return self._pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], text) if self._pattern else text

    def _parts(self, text: str) -> tuple[str, str, str]:
        before = next((token for token in self._edges if text.startswith(token)), "")
        after = next(
            (token for token in self._edges if text.endswith(token) and len(text) >= len(before) + len(token)), ""
        )
        return before, text[len(before) : len(text) - len(after)], after


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """The ids of each text, without those of marks. Rows longer than the model's context are cut later."""
    if not texts:
        return []
    marked = any(MARK in text for text in texts)
    found = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_offsets_mapping=marked,
        verbose=False,
    )
    ids: list[list[int]] = found["input_ids"]
    if not marked:
        return ids
    spans = found["offset_mapping"]
    return [
        [i for i, (a, b) in zip(row, where, strict=True) if text[a:b] != MARK]
        for text, row, where in zip(texts, ids, spans, strict=True)
    ]


def _texts(value: object) -> Iterator[str]:
    """All texts in a value of lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a value of lists and dictionaries, its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(part, change) for part in value]
    return {key: _changed(part, change) for key, part in value.items()} if isinstance(value, dict) else value


class ChatEncoder:
    """Encodes conversations; see the module's text for how."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, template_file: Path | None = None) -> None:
        """`template_file`: where the tokenizer's chat template comes from, if not from its own folder; errors name it.

        Raises ModelError for a template that cannot be trained on.
        """
        self.tokenizer, self.max_length = tokenizer, max_length
        self._called = f"the chat template {template_file or f'of {tokenizer.name_or_path}'}"
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template, which conversations need: set "
                "model.chat_template to a Jinja file (instruct models bring their own), or train on plain text with "
                "tuning.objective pretrain"
            )
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
            tokenizer.all_special_ids
        )
        self.template = ChatTemplate(tokenizer)
        self.end, self.ending = self._end_of_turn()

    def encode(self, conversations: list[Conversation]) -> list[Encoded | DataError]:
        """One result a conversation, in order; an error (its place is not known here) where the template refuses it."""
        answers = [self._answers(self.adapt(c)) for c in conversations]
        texts = [
            text for row in answers if isinstance(row, list) for answer in row for text in (answer.prompt, answer.whole)
        ]
        tokens = iter(self._tokens(texts))
        return [
            self._assemble([(a, next(tokens), next(tokens)) for a in row]) if isinstance(row, list) else row
            for row in answers
        ]

    def adapt(self, conversation: Conversation) -> Conversation:
        """The conversation in roles that the template knows (:meth:`ChatTemplate.adapt`)."""
        return Conversation(*self.template.adapt(conversation.messages, conversation.tools))

    def _answers(self, conversation: Conversation) -> list[_Answer] | DataError:
        messages, answers = conversation.messages, []
        for number, message in enumerate(messages):
            if message.get("weight") == 0:
                continue
            # An answer to nothing cannot be asked for, and an empty one teaches to say nothing.
            if (
                message["role"] != "assistant"
                or not number
                or not (text_of(message["content"]).strip() or message.get("tool_calls"))
            ):
                continue
            try:
                prompt = self.template.render(messages[:number], conversation.tools, prompt=True)
                whole = self.template.render(messages[: number + 1], conversation.tools, prompt=False)
            except Exception as error:  # a template is a program of the model's: it raises what it likes
                return DataError(f"the chat template rejects the row: {error}")
            if not whole.startswith(prompt):
                return DataError(f"turn {number + 1}: {_not_a_prefix(prompt, whole)}")
            if (message.get("reasoning_content") or "").strip() not in whole[len(prompt) :]:
                return DataError(
                    f"turn {number + 1}: the chat template ignores 'reasoning_content', so it would not be trained: "
                    "set model.chat_template to one that writes it, move it into 'content', or remove it from the "
                    "data"
                )
            answers.append(
                _Answer(prompt, whole.removesuffix(self.ending), True) if self.ending else _Answer(prompt, whole, False)
            )
        return answers

    def _assemble(self, answers: list[tuple[_Answer, list[int], list[int]]]) -> Encoded:
        encoded = Encoded()
        ids: list[int] = []
        labels: list[int] = []
        for answer, prompt, whole in answers:
            # If a token lies across the boundary, the answer is tokenized by itself: the server sends the prompt as it
            # is.
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
        if not encoded.sequences:
            encoded.lost = TOO_LONG if encoded.truncated else NO_ANSWER
        return encoded

    def _ended(self, answer: list[int], cut: bool) -> list[int]:
        """The answer's tokens up to its end-of-turn token; templates put line breaks and more after it, which no one
        generates."""
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
        return tokens_of(self.tokenizer, texts, add_special_tokens=False)  # the template writes them

    def _end_of_turn(self) -> tuple[int, str]:
        """The end-of-turn token, and the text to replace by it if the template ends a turn without any special
        token."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            prompt, whole = (
                self.template.render([question], None, prompt=True),
                self.template.render([question, answer], None, prompt=False),
            )
        except Exception as error:
            raise ModelError(f"{self._called} fails on a question and an answer: {error}") from error
        if not whole.startswith(prompt) or "answer" not in whole[len(prompt) :]:
            raise ModelError(f"{self._called} cannot be trained on: {_not_a_prefix(prompt, whole)}")
        ending = whole[len(prompt) :].rpartition("answer")[2]
        added = self.tokenizer.added_tokens_decoder
        ids = self._tokens([ending])[0]
        for ends in (self.special, {i for i, token in added.items() if token.content.strip()}):
            found = next((i for i in ids if i in ends), None)
            if found is not None:
                return found, ""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"neither {self._called} nor the tokenizer of {self.tokenizer.name_or_path} has a token that ends a "
                "turn: set model.chat_template to one that has"
            )
        return self.tokenizer.eos_token_id, ending


def _not_a_prefix(prompt: str, whole: str) -> str:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
    here = slice(max(0, same - 20), same + 40)
    return (
        f"the template's prompt for an answer ends with {prompt[here]!r}, but the conversation with the answer "
        f"continues there with {whole[here]!r}, so serving would use a different prompt than training; set "
        "model.chat_template to a template whose prompt is a prefix of the answered conversation"
    )


class PairEncoder:
    """Encodes preference pairs: both answers after the same tokens of the prompt, and supervised alone.

    Nothing of a pair is cut: the log-probability of half an answer is no measure of it, and a prompt without its
    beginning is another prompt. Where either answer does not end within the encoder's `max_length`, the pair is lost.
    """

    def __init__(self, chat: ChatEncoder) -> None:
        self.chat = chat

    def encode(self, pairs: list[Pair]) -> list[Encoded | DataError]:
        """One result a pair, in order; an error (its place is not known here) where the template refuses it."""
        sides = [_answered(side, pair.shared) for pair in pairs for side in (pair.chosen, pair.rejected)]
        encoded = iter(self.chat.encode(sides))
        return [self._laid_out(next(encoded), next(encoded)) for _ in pairs]

    def _laid_out(self, chosen: Encoded | DataError, rejected: Encoded | DataError) -> Encoded | DataError:
        answers: list[Encoded] = []
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if isinstance(side, DataError):
                return DataError(f"{name}: {side}")
            if len(side.sequences) > 1:
                return DataError(
                    f"{name}: the chat template writes its turns otherwise once others follow, so that they are no one "
                    "answer: end chosen and rejected after the first answer in which they differ"
                )
            answers.append(side)
        longest, truncated = max(side.longest for side in answers), any(side.truncated for side in answers)
        pair = Encoded(longest=longest, truncated=truncated)
        first, second = (side.sequences for side in answers)
        if truncated:
            pair.lost = PAIR_TOO_LONG
        elif not first or not second:
            pair.lost = NO_ANSWER
        elif first == second:
            pair.lost = SAME
        else:
            (a,), (b,) = first, second
            pair.sequences = [Sequence(a.input_ids + b.input_ids, a.labels + b.labels, len(a.input_ids))]
        return pair


def _answered(conversation: Conversation, shared: int) -> Conversation:
    """The conversation with nothing learnt of its first `shared` messages."""
    before = [message | {"weight": 0} for message in conversation.messages[:shared]]
    return Conversation(before + conversation.messages[shared:], conversation.tools)


class TextEncoder:
    """Encodes plain text: every token is learnt, an end-of-text token after the last, cut into pieces of
    `max_length`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token) to mark where a "
                "text ends: set model.tokenizer to another tokenizer"
            )
        self.tokenizer, self.max_length, self.end = tokenizer, max_length, tokenizer.eos_token_id

    def encode(self, texts: list[Text]) -> list[Encoded | DataError]:
        """One result a text, in order."""
        # With the special tokens the tokenizer puts around a text (a BOS, where the model was trained with one).
        tokens = tokens_of(self.tokenizer, [t.text for t in texts], add_special_tokens=True)
        return [
            self._pieces(ids) if text.text.strip() else Encoded(lost=NO_ANSWER)
            for text, ids in zip(texts, tokens, strict=True)
        ]

    def _pieces(self, ids: list[int]) -> Encoded:
        # A text may begin with a BOS, and end with the end of text, of its own.
        begin = self.tokenizer.bos_token_id
        while begin is not None and ids[:2] == [begin, begin]:
            ids = ids[1:]
        while ids[-2:] == [self.end, self.end]:
            ids = ids[:-1]
        if ids[-1:] != [self.end]:
            ids = [*ids, self.end]
        starts = list(range(0, len(ids), self.max_length))
        if len(ids) - starts[-1] == 1 and len(starts) > 1:
            starts[-1] -= 1  # a last piece of one token has nothing to predict it from
        pieces = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        sequences = [Sequence(p, [IGNORED, *p[1:]]) for p in pieces if len(p) > 1]
        return Encoded(sequences, longest=len(ids), lost="" if sequences else NO_ANSWER)
