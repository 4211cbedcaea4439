"""Encodes conversations and texts as tokens and labels.

By construction, training uses the same prompts as serving. For each assistant answer, the chat template renders the
answer's prompt (``add_generation_prompt=True``, as a server does), and the conversation up to the end of the answer.
Tokens of the prompt are not supervised; those after it are, up to and including the end-of-turn token. If the next
answer's prompt starts with exactly these tokens, it extends the sequence. If not (some templates remove the reasoning
from earlier answers, or move tools behind the last question), the next answer starts a new sequence, again with exactly
the tokens that a server would send. So markers such as ``{% generation %}`` are not needed, but do no harm.

Labels are aligned with the tokens (``labels[t]`` is ``input_ids[t]`` or -100; the loss shifts them by one). The first
label of a sequence is always -100: nothing is predicted from a neighbour in the same pack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.formats import Content, Conversation, Pair, Rated, Text
from llm_ray.errors import DataError, ModelError
from llm_ray.models.chat import ChatTemplate, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not supervised
NO_ANSWER = "nothing to learn in it (no answer, or an empty one)"
TOO_LONG = "the first answer does not end within data.max_length"
PAIR_TOO_LONG = "an answer of the pair does not end within data.max_length"
RATED_TOO_LONG = "the answer does not end within data.max_length"
SAME = "both answers of the pair are the same"
_TORN = "the chat template renders its turns differently once others follow, so they do not form one answer"
MARK = "\ufdd0"  # does not occur in texts: Unicode reserves it for internal use of programs


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens and their labels, of the same length. For a pair: the row with the chosen answer, then the one with the
    rejected answer, each with its prompt."""

    input_ids: list[int]
    labels: list[int]
    chosen: int = 0
    """For a pair, the length of the row with the chosen answer; else 0."""
    good: bool | None = None
    """Whether the answer is rated good; None if it is not rated."""

    @property
    def prompt(self) -> int:
        """Number of tokens before the first supervised one."""
        return next((n for n, label in enumerate(self.labels) if label != IGNORED), len(self.labels))

    def rows(self) -> list[Sequence]:
        """Returns the rows that the model computes separately: this one, or both of a pair."""
        if not self.chosen:
            return [self]
        return [
            Sequence(self.input_ids[part], self.labels[part])
            for part in (slice(0, self.chosen), slice(self.chosen, None))
        ]


@dataclass(slots=True)
class Encoded:
    """A row's sequences (empty if nothing is supervised), and what was cut."""

    sequences: list[Sequence] = field(default_factory=list)
    longest: int = 0
    """Length in tokens before anything was cut."""
    truncated: bool = False
    """Whether answers at the end were dropped because they did not fit."""
    lost: str = field(default="", compare=False)
    """Why the row is dropped; empty if it is used."""


@dataclass(slots=True)
class _Answer:
    """Rendered texts of an answer: its prompt, and the prompt with the answer."""

    prompt: str
    whole: str
    cut: bool
    """Whether the template has no end-of-turn token, so that one is appended to `whole`."""


def encoder_for(
    conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[Any]], list[Encoded | DataError]]:
    """Returns the encoder for the conf's objective. It converts a list of contents to one result each, in order: a
    DataError (without file and line) if the chat template rejects the content.

    Raises ModelError for a tokenizer or chat template that cannot be used for training.
    """
    if conf.objective.reads == "texts":
        return TextEncoder(tokenizer, conf.data.max_length).encode
    chat = ChatEncoder(tokenizer, conf.data.max_length, conf.model.chat_template)
    if conf.objective.reads == "ratings":
        return RatedEncoder(chat).encode
    return PairEncoder(chat).encode if conf.objective.reads == "pairs" else chat.encode


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the token that ends an assistant turn under the tokenizer's chat template.

    Generation has to stop at it, so the generation config's ``eos_token_id`` must contain it. Raises
    :class:`ModelError` if there is no chat template, or neither the template nor the tokenizer has such a token.
    """
    return ChatEncoder(tokenizer, max_length=1).end


class SpecialTokens:
    """Special tokens of the tokenizer that occur in the texts of rows, where they would take effect: ``<|im_end|>`` in a
    question would end its turn.

    Raises ModelError, with `escape`, for a tokenizer that does not report the positions of tokens in the text.
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
        """Returns the first special token in the texts; empty if there is none. A BOS at the start of a plain text and
        an EOS at its end do not count."""
        if not self._pattern:
            return ""
        if isinstance(content, Pair):
            return self.found(content.chosen) or self.found(content.rejected)
        if isinstance(content, Rated):
            return self.found(content.conversation)
        if isinstance(content, Text):
            return match[0] if (match := self._pattern.search(self._parts(content.text)[1])) else ""
        return next(
            (match[0] for text in _texts([content.messages, content.tools]) if (match := self._pattern.search(text))),
            "",
        )

    def escaped(self, content: Content) -> Content:
        """Returns the content with a mark inside each special token, which :func:`tokens_of` removes after tokenizing,
        so that they are encoded as ordinary text."""
        if isinstance(content, Pair):
            return Pair(self._escaped(content.chosen), self._escaped(content.rejected), content.shared)
        if isinstance(content, Rated):
            return Rated(self._escaped(content.conversation), content.shared, content.good)
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
    """Returns the token ids of each text, without those of marks. Texts may exceed the model's context: they are cut
    later."""
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
    """Yields all strings in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a copy of nested lists and dictionaries with `change` applied to all strings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(part, change) for part in value]
    return {key: _changed(part, change) for key, part in value.items()} if isinstance(value, dict) else value


class ChatEncoder:
    """Encodes conversations, as described in the module's docstring."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, template_file: Path | None = None) -> None:
        """`template_file`: source of the tokenizer's chat template, if it is not its own folder; used in errors.

        Raises ModelError for a template that cannot be used for training.
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
        """Returns one result per conversation, in order: a DataError (without file and line) if the template rejects
        it."""
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
        """Returns the conversation with roles that the template supports (:meth:`ChatTemplate.adapt`)."""
        return Conversation(*self.template.adapt(conversation.messages, conversation.tools))

    def _answers(self, conversation: Conversation) -> list[_Answer] | DataError:
        messages, answers = conversation.messages, []
        for number, message in enumerate(messages):
            if message.get("weight") == 0:
                continue
            # Skip an answer without a question, which nobody can prompt for, and empty ones, which teach silence.
            if (
                message["role"] != "assistant"
                or not number
                or not (text_of(message["content"]).strip() or message.get("tool_calls"))
            ):
                continue
            try:
                prompt = self.template.render(messages[:number], conversation.tools, prompt=True)
                whole = self.template.render(messages[: number + 1], conversation.tools, prompt=False)
            except Exception as error:  # a template is code from the model, and may raise anything
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
            # If a token spans the boundary, tokenize the answer separately, since a server sends the prompt alone.
            together = whole[: len(prompt)] == prompt
            after = whole[len(prompt) :] if together else self._tokens([answer.whole[len(answer.prompt) :]])[0]
            supervised = self._ended(after, answer.cut)
            length = len(prompt) + len(supervised)
            encoded.longest = max(encoded.longest, length)
            # Later answers may refer to one that was cut, so they are cut, too.
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
        """Returns the answer's tokens up to its end-of-turn token. What templates write after it, such as line breaks,
        is never generated."""
        if cut:
            return [*answer, self.end]
        if self.end in answer:
            return answer[: len(answer) - answer[::-1].index(self.end)]
        # A tool call may end with a different token than a text answer.
        last = max((i for i, token in enumerate(answer) if token in self.special), default=None)
        if last is not None and not self.tokenizer.decode(answer[last + 1 :]).strip():
            return answer[: last + 1]
        return [*answer, self.end]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return tokens_of(self.tokenizer, texts, add_special_tokens=False)  # the template adds them

    def _end_of_turn(self) -> tuple[int, str]:
        """Returns the end-of-turn token; if the template has none, EOS, and the text after an answer to replace by
        it."""
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
    """Encodes preference pairs: the same prompt tokens before both answers, and only the answers supervised.

    Pairs are never cut: the log-probability of half an answer says nothing about the whole, and a shortened prompt is a
    different prompt. A pair is dropped if either answer does not end within the encoder's `max_length`.
    """

    def __init__(self, chat: ChatEncoder) -> None:
        self.chat = chat

    def encode(self, pairs: list[Pair]) -> list[Encoded | DataError]:
        """Returns one result per pair, in order: a DataError (without file and line) if the template rejects it."""
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
                    f"{name}: {_TORN}: end chosen and rejected after the first answer in which they differ"
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


class RatedEncoder:
    """Encodes rated answers, each with its prompt and only the answer supervised; a pair as two of them, the chosen one
    rated good and the rejected one bad.

    Nothing is cut, for the reasons of :class:`PairEncoder`: an answer is dropped if it does not end within the encoder's
    `max_length`, and a pair if either does not.
    """

    def __init__(self, chat: ChatEncoder) -> None:
        self.chat, self.pairs = chat, PairEncoder(chat)

    def encode(self, contents: list[Rated | Pair]) -> list[Encoded | DataError]:
        """Returns one result per content, in order: a DataError (without file and line) if the template rejects it."""
        rated = [content for content in contents if isinstance(content, Rated)]
        answers = iter(self.chat.encode([_answered(one.conversation, one.shared) for one in rated]))
        pairs = iter(self.pairs.encode([content for content in contents if isinstance(content, Pair)]))
        return [
            _both_rated(next(pairs)) if isinstance(content, Pair) else _rated(next(answers), content.good)
            for content in contents
        ]


def _rated(answer: Encoded | DataError, good: bool) -> Encoded | DataError:
    """Returns the encoded answer with its rating, or without sequences if it is cut."""
    if isinstance(answer, DataError):
        return answer
    if len(answer.sequences) > 1:
        return DataError(f"{_TORN}: end the completion after its first answer")
    if answer.truncated:
        return replace(answer, sequences=[], lost=RATED_TOO_LONG)
    return replace(answer, sequences=[replace(one, good=good) for one in answer.sequences])


def _both_rated(pair: Encoded | DataError) -> Encoded | DataError:
    """Returns the encoded pair as a good and a bad answer."""
    if isinstance(pair, DataError) or not pair.sequences:
        return pair
    chosen, rejected = pair.sequences[0].rows()
    return replace(pair, sequences=[replace(chosen, good=True), replace(rejected, good=False)])


def _answered(conversation: Conversation, shared: int) -> Conversation:
    """Returns the conversation with its first `shared` messages not supervised."""
    before = [message | {"weight": 0} for message in conversation.messages[:shared]]
    return Conversation(before + conversation.messages[shared:], conversation.tools)


class TextEncoder:
    """Encodes plain text: all tokens are supervised, followed by an end-of-text token, and cut into pieces of
    `max_length`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token) to mark where a "
                "text ends: set model.tokenizer to another tokenizer"
            )
        self.tokenizer, self.max_length, self.end = tokenizer, max_length, tokenizer.eos_token_id

    def encode(self, texts: list[Text]) -> list[Encoded | DataError]:
        """Returns one result per text, in order."""
        # With the special tokens that the tokenizer adds around a text (a BOS, if the model was trained with one).
        tokens = tokens_of(self.tokenizer, [t.text for t in texts], add_special_tokens=True)
        return [
            self._pieces(ids) if text.text.strip() else Encoded(lost=NO_ANSWER)
            for text, ids in zip(texts, tokens, strict=True)
        ]

    def _pieces(self, ids: list[int]) -> Encoded:
        # The text itself may contain a BOS and an end-of-text token.
        begin = self.tokenizer.bos_token_id
        while begin is not None and ids[:2] == [begin, begin]:
            ids = ids[1:]
        while ids[-2:] == [self.end, self.end]:
            ids = ids[:-1]
        if ids[-1:] != [self.end]:
            ids = [*ids, self.end]
        starts = list(range(0, len(ids), self.max_length))
        if len(ids) - starts[-1] == 1 and len(starts) > 1:
            starts[-1] -= 1  # a piece of one token would have nothing supervised
        pieces = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        sequences = [Sequence(p, [IGNORED, *p[1:]]) for p in pieces if len(p) > 1]
        return Encoded(sequences, longest=len(ids), lost="" if sequences else NO_ANSWER)
