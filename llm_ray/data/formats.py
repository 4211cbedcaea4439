"""Converts rows of the supported formats to conversations, texts, preference pairs or rated answers.

| format | columns (optional ones in brackets) |
| --- | --- |
| alpaca | instruction, output, [input, history, system] |
| dolly | instruction, response, [context, system] |
| messages | messages: list of {role, content, [tool_calls, function_call, reasoning_content, weight]}, [tools, system] |
| sharegpt | conversations: list of {from, value}, [tools, system] |
| prompt_completion | prompt, completion, [label, tools, system] |
| question_answer | question, answer, [context, system] |
| preference | chosen, rejected, [prompt, conversations, tools, system] |
| openai_preference | input: {messages, [tools]}, preferred_output, non_preferred_output: lists of messages, [system] |
| text | text |

A conversation has the form of :mod:`llm_ray.models.chat`: roles system, user, assistant and tool; content as text or a
list of several text parts; an assistant's ``tool_calls`` with arguments as an object; ``tools`` as JSON schemas of
functions. An answer with ``weight`` 0 is not supervised; ``train``, ``training`` and ``loss``, used by other trainers,
mean the same.

Answers of a preference pair are texts, turns, or whole conversations, whose common beginning is the prompt. Otherwise
the prompt is in `prompt` (text or turns) or `conversations` (ShareGPT).

Rated answers are rows of any format of one answer, with a column `label` (or `kto_tag`, as LLaMA-Factory calls it): true
for a good answer, false for a bad one. It rates the last turn, or the whole `completion`, which may be turns. Pairs count
as a good and a bad answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_ray.conf.finetune import Data
from llm_ray.conf.objectives import PAIR_FORMATS, Reads, objectives_reading
from llm_ray.data.jsontext import Parser, Unsound, reason
from llm_ray.data.sources import Row
from llm_ray.errors import ConfError, DataError
from llm_ray.models.chat import Message, text_of
from llm_ray.nearest import nearest_names

# Formats are detected by their required columns; if a row has those of several formats, the first one wins.
REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "preference": ("chosen", "rejected"),
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "alpaca": ("input", "history", "system"),
    "dolly": ("context", "system"),
    "prompt_completion": ("label", "system"),
    "question_answer": ("context", "system"),
    "preference": ("prompt", "conversations", "tools", "system"),
    "openai_preference": ("system",),
    "text": (),
}
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (role, content, tool_calls) and the functions the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, supervised as a whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations whose first `shared` messages, the prompt, are the same; the rest of `chosen` is preferred to the
    rest of `rejected`."""

    chosen: Conversation
    rejected: Conversation
    shared: int


@dataclass(frozen=True, slots=True)
class Rated:
    """A conversation whose turns after the first `shared` ones, the prompt, are rated."""

    conversation: Conversation
    shared: int
    good: bool


Content = Conversation | Text | Pair | Rated


class Formatter:
    """Converts rows to conversations, texts, pairs or rated answers, by ``data.format``, ``data.columns`` and
    ``data.system``.

    With ``format: auto`` each file's format is detected from its first valid row. ``formats`` collects the formats
    found; ``left_out`` counts, for each unused column or field of turns, the rows where it is not empty.
    """

    def __init__(self, data: Data, reads: Reads) -> None:
        """`reads`: the kind of content that the objective reads; with ``format: auto``, other formats are errors."""
        self.data, self.reads = data, reads
        self.formats: list[str] = []
        self.left_out: Counter[str] = Counter()
        self._of_file: dict[str, str] = {}
        self._check_columns()

    def __call__(self, row: Row) -> Content:
        """Converts the row. Raises :class:`DataError` with file and line."""
        try:
            values = self._rename(row.values)
            form = self._of_file.get(row.file)
            if form is None:
                form = self._detect(values) if self.data.format == "auto" else self.data.format
                self._of_file[row.file] = form
                if form not in self.formats:
                    self.formats.append(form)
            return self._convert(form, values)
        except _Bad as bad:
            raise DataError(f"{row.place}: {bad}") from None
        except RecursionError:
            raise DataError(f"{row.place}: nested too deeply") from None

    def _optional(self, form: str) -> tuple[str, ...]:
        """Returns the optional columns of the format."""
        if self.reads == "ratings" and form not in PAIR_FORMATS:
            return (*OPTIONAL[form], *RATINGS, "tools")
        return OPTIONAL[form]

    def _check_columns(self) -> None:
        known = {
            c
            for f in (REQUIRED if self.data.format == "auto" else [self.data.format])
            for c in (*REQUIRED[f], *self._optional(f))
        }
        for name in self.data.columns:
            if name not in known:
                nearest = nearest_names(name, known)
                raise ConfError(
                    f"data.columns: {name!r} is not a column of format {self.data.format}; write {{name in the "
                    f"format: name in your data}}, with the names {', '.join(sorted(known))}"
                    + (f" (nearest: {nearest[0]})" if nearest else "")
                )

    def _rename(self, values: dict[str, Any]) -> dict[str, Any]:
        if not self.data.columns:
            return values
        renamed = dict(values)
        for name, yours in self.data.columns.items():
            if yours not in values:
                raise _Bad(f"no column {yours!r}, which data.columns maps to {name!r}; the row has {_names(values)}")
            if renamed.get(yours) is values[yours]:
                renamed.pop(yours)
            renamed[name] = values[yours]
        return renamed

    def _detect(self, values: dict[str, Any]) -> str:
        if self.reads == "texts":
            if "text" in values:
                return "text"
            raise _Bad(
                f"tuning.objective pretrain needs a column 'text', the row has {_names(values)}: name yours in "
                f"data.columns, e.g. {{text: {next(iter(values), 'body')}}}"
            )
        pair = next((form for form in PAIR_FORMATS if all(c in values for c in REQUIRED[form])), None)
        if self.reads == "pairs":
            if pair:
                return pair
            raise _Bad(
                f"tuning.objective {objectives_reading('pairs')} needs the columns 'chosen' and 'rejected', the row has {_names(values)}: name "
                f"yours in data.columns, e.g. {{chosen: {next(iter(values), 'better')}}}, or use objective sft "
                "with rows of one answer each, or kto with rated ones"
            )
        if pair and self.reads == "ratings":
            return pair
        if pair:
            raise _Bad(
                f"preference pairs ({', '.join(REQUIRED[pair])}), which tuning.objective {objectives_reading('pairs')} "
                "learns from; for sft use rows with one answer each"
            )
        for form, required in REQUIRED.items():
            if form not in (*PAIR_FORMATS, "text") and all(c in values for c in required):
                return form
        if "text" in values:
            raise _Bad(
                f"plain text has no answers for tuning.objective {'kto' if self.reads == 'ratings' else 'sft'}: use "
                "objective pretrain, or another format"
            )
        shapes = "; ".join(f"{f} ({', '.join(r)})" for f, r in REQUIRED.items() if f not in PAIR_FORMATS)
        wanted = [c for r in REQUIRED.values() for c in r]
        near = {c: nearest_names(str(c), wanted) for c in values if c not in wanted}
        hints = [f"{column!r} looks like {match[0]!r}" for column, match in near.items() if match]
        raise _Bad(
            f"cannot detect the format: the row has {_names(values)}; known are {shapes}"
            + (f"; {', '.join(hints)}" if hints else "")
            + ". Name your columns in data.columns, e.g. {question: title, answer: body}"
        )

    def _convert(self, form: str, values: dict[str, Any]) -> Content:
        known = (*REQUIRED[form], *self._optional(form))
        unused = {str(c) for c, v in values.items() if c not in known and not _is_empty(v)}
        missing = [c for c in REQUIRED[form] if values.get(c) is None]
        if missing:
            lacks = " and ".join(f"{c!r}, which is {'null here' if c in values else 'missing'}" for c in missing)
            both = ": give it, or leave the row out (data.on_bad_row: skip)" if form in PAIR_FORMATS else ""
            raise _Bad(f"format {form} needs {lacks}; the row has {_names(values)}{both}")
        content: Content
        if form == "text":
            content = Text(_string(values, "text"))
        elif form in PAIR_FORMATS:
            content = self._pair(form, values, unused)
        elif self.reads == "ratings":
            content = self._rated(form, values, unused)
        else:
            content = self._conversation(form, values, unused)
        self.left_out.update(unused)
        return content

    def _conversation(self, form: str, values: dict[str, Any], unused: set[str]) -> Conversation:
        unused |= _check_label(form, values)
        messages, tools = self._answered(form, values, unused)
        _check_media(values, messages)
        self._add_system(values, messages)
        return Conversation(messages, tools)

    def _answered(
        self, form: str, values: dict[str, Any], unused: set[str]
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Returns messages and tools of a row of one answer."""
        if form in ("messages", "sharegpt"):
            messages = _turns(values, REQUIRED[form][0], unused)
            tools = _tools(values.get("tools"))
        else:
            question, answer = REQUIRED[form]
            extra = {"alpaca": "input", "dolly": "context", "question_answer": "context"}.get(form)
            more = _string(values, extra) if extra and values.get(extra) is not None else ""
            prompt = "\n\n".join(part for part in (_string(values, question), more) if part.strip())
            messages, tools = (
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": _string(values, answer)}],
                None,
            )
            if not prompt:
                raise _Bad(f"{question!r} is empty")
            if form == "alpaca":
                messages = [*_history(values.get("history")), *messages]
        return messages, tools

    def _rated(self, form: str, values: dict[str, Any], unused: set[str]) -> Rated:
        good = _rating(values)
        if form == "prompt_completion":
            prompt, tools = _prompt(values, unused), _tools(values.get("tools"))
            if not prompt:
                raise _Bad("'prompt' is empty")
            messages = _side(values, "completion", prompt, unused)
            shared = len(prompt)
            if len(messages) <= shared or messages[shared]["role"] != "assistant" or messages[:shared] != prompt:
                raise _Bad(
                    "'completion' must be the answer to 'prompt': text, or turns that begin with the assistant's"
                )
        else:
            messages, tools = self._answered(form, values, unused)
            tools = tools or _tools(values.get("tools"))
            shared = len(messages) - 1
        if messages[-1]["role"] != "assistant":
            raise _Bad(
                f"the row ends with a turn of role {messages[-1]['role']}, but its rating is of an answer: end it with "
                "the assistant's turn that is rated"
            )
        _check_media(values, messages)
        before = len(messages)
        self._add_system(values, messages)
        return Rated(Conversation(messages, tools), shared + len(messages) - before, good)

    def _add_system(self, values: dict[str, Any], messages: list[Message]) -> None:
        """Prepends the system message of the row, else of the conf, to messages without one."""
        if messages[0]["role"] != "system":
            system = _system(values["system"]) if values.get("system") else self.data.system
            if system:
                messages.insert(0, {"role": "system", "content": system})

    def _pair(self, form: str, values: dict[str, Any], unused: set[str]) -> Pair:
        if form == "openai_preference":
            prompt, tools = _input(values, unused)
        else:
            prompt, tools = _prompt(values, unused), _tools(values.get("tools"))
        chosen, rejected = (_side(values, column, prompt, unused) for column in REQUIRED[form][-2:])
        shared = _shared_prompt(chosen, rejected)
        if not shared:
            raise _Bad(
                "the answers have no prompt: give it in a column 'prompt' (data.columns: {prompt: …}), or begin chosen "
                "and rejected with the same turns"
            )
        own = [text_of(m["content"]).strip() for m in chosen[:shared]]
        if prompt and own[shared - len(prompt) :] != [text_of(m["content"]).strip() for m in prompt]:
            raise _Bad(
                "'prompt' differs from the turns before the answers in 'chosen' and 'rejected': leave one of the two out"
            )
        for messages in (chosen, rejected):
            _check_media(values, messages)
            before = len(messages)
            self._add_system(values, messages)
        return Pair(Conversation(chosen, tools), Conversation(rejected, tools), shared + len(messages) - before)


class _Bad(Exception):
    """An error in a row; file and line are added by the caller."""


def _names(values: Mapping[str, Any]) -> str:
    return f"the columns {', '.join(map(str, values))}" if values else "no columns"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _string(values: Mapping[str, Any], column: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise _Bad(f"{column!r} must be text, but is {_shown(value)}")
    return value


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _system(value: object) -> str | list[dict[str, str]]:
    """Checks the column `system`: text, or text parts as in a message."""
    if isinstance(value, list):
        return _parts(value, "'system'")
    if not isinstance(value, str):
        raise _Bad(f"'system' must be text, but is {_shown(value)}")
    return value


def _check_label(form: str, values: dict[str, Any]) -> set[str]:
    """Raises _Bad for a row marked as a bad answer, as in KTO data. Returns label columns with other contents, which are
    unused."""
    unused: set[str] = set()
    for column in RATINGS:
        value = values.get(column)
        word = _word(value)
        if (
            word is False
            or word == "false"
            or ((form == "prompt_completion" or column == "kto_tag") and word in BAD_LABELS)
        ):
            raise _Bad(
                f"{column!r} is {_shown(value)}: its answer is marked as bad, but tuning.objective sft would learn "
                "it; remove such rows, or use objective kto, which learns from good and bad answers"
            )
        if column in OPTIONAL[form] and not _is_empty(value) and word not in (True, "true", "1"):
            unused.add(column)
    return unused


def _word(value: object) -> object:
    """Returns a rating for comparison: texts without white space around them and in small letters."""
    return value.strip().lower() if isinstance(value, str) else value


def _rating(values: dict[str, Any]) -> bool:
    """Returns whether a row's answer is rated good."""
    given = {column: values[column] for column in RATINGS if values.get(column) is not None}
    if not given:
        null = next((f"{c!r} is null here" for c in RATINGS if c in values), f"the row has {_names(values)}")
        raise _Bad(
            f"tuning.objective kto needs a rating of the answer in a column 'label': true for a good one, false for a bad "
            f"one; {null}. Give it, or name yours in data.columns, e.g. {{label: thumbs_up}}"
        )
    ratings = set()
    for column, value in given.items():
        word = _word(value)
        if word not in (*GOOD_RATINGS, *BAD_RATINGS):
            raise _Bad(f"{column!r} must be true (a good answer) or false (a bad one), but is {_shown(value)}")
        ratings.add(word in GOOD_RATINGS)
    if len(ratings) > 1:
        raise _Bad("'label' and 'kto_tag' rate the answer differently: keep one of them")
    return ratings.pop()


def _parsed(value: object, what: str) -> object:
    """Parses JSON text, as which CSV files and many data sets store lists; returns other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return Parser().parse(value)
    except json.JSONDecodeError as error:
        raise _Bad(f"{what} is not JSON: {error.msg} at character {error.pos + 1} of {_shown(value)}") from None
    except (Unsound, RecursionError) as error:
        raise _Bad(f"{what}: {reason(error)}") from None


def _check_json(value: object, what: str) -> None:
    """Raises _Bad for values that JSON does not support, such as bytes or NaN from tables and processors: the model would
    learn to write what clients cannot parse."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _Bad(f"{what} contain a value that JSON does not support: {error}") from None


BAD_LABELS = (0, -1, "0", "-1", "bad", "no", "rejected", "undesirable")
"""Further values that mean False in KTO data, for columns that can have no other meaning."""
RATINGS = ("label", "kto_tag")
"""Columns with the rating of an answer: TRL's name, and LLaMA-Factory's."""
GOOD_RATINGS, BAD_RATINGS = (True, "true", "1"), (False, "false", "0")
"""Ratings, as which 1 and 0 count too: tables and CSV files store them so."""
SUPERVISED = ("weight", "train", "training", "loss")
"""Fields of a turn that say whether its answer is supervised."""
USED = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls", "function_call", "reasoning_content"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
"""Fields of a turn that are used, by role."""


def _turns(values: dict[str, Any], column: str, unused: set[str], before: Sequence[Message] = ()) -> list[Message]:
    """Returns the messages `before`, followed by those of the column; adds unused fields of turns to `unused`."""
    turns = _parsed(values[column], repr(column))
    if not isinstance(turns, list) or not turns:
        raise _Bad(f"{column!r} must be a list of turns, but is {_shown(turns)}")
    messages = [*before]
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {column!r}"
        if not isinstance(turn, dict):
            raise _Bad(f"{where} must be an object, but is {_shown(turn)}")
        # JSON converted from tables has all keys in all turns.
        fields = {key: value for key, value in turn.items() if value is not None}
        # Both forms of turns occur under both column names.
        add: Callable[[list[Message], dict[str, Any], str], None] = (
            _sharegpt_turn if "from" in fields else _messages_turn
        )
        add(messages, fields, where)
        used = ("from", "value") if "from" in fields else USED[ROLES[fields["role"]]]
        unused |= {
            f"{column}[].{key}"
            for key, value in fields.items()
            if key not in (*used, *SUPERVISED) and not _is_empty(value)
        }
        for key in SUPERVISED:
            if (supervised := fields.get(key, 1)) not in (0, 1):
                raise _Bad(f"{where}: {key} is {_shown(supervised)}: must be 1 (train on the answer) or 0 (do not)")
            if not supervised and messages[-1]["role"] == "assistant":
                messages[-1]["weight"] = 0
    return messages


_TURNS = re.compile(r"""\s*\[?\s*\{\s*"(role|content|from|value)"\s*:""")
"""Beginning of turns as JSON text, as in a CSV; other texts are the answer or prompt itself."""


def _as_turns(values: dict[str, Any], column: str, role: str) -> dict[str, Any]:
    """Returns a row of only this column, its text, turn or turns converted to a list of turns."""
    value = values[column]
    if isinstance(value, str) and not _TURNS.match(value):
        return {column: [{"role": role, "content": value}]}
    value = _parsed(value, repr(column))
    return {column: value if isinstance(value, list) else [value]}


def _prompt(values: dict[str, Any], unused: set[str]) -> list[Message]:
    """Returns the prompt of a pair from its own column; empty if there is none."""
    column = next((name for name in ("prompt", "conversations") if not _is_empty(values.get(name))), None)
    if column is None:
        return []
    if column == "prompt" and values.get("conversations"):
        unused.add("conversations")
    return _checked_prompt(_turns(_as_turns(values, column, "user"), column, unused), column)


def _input(values: dict[str, Any], unused: set[str]) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Returns prompt and tools of a pair in OpenAI's format."""
    value = _parsed(values["input"], "'input'")
    if not isinstance(value, dict) or not value.get("messages"):
        raise _Bad(f"'input' must be an object with the prompt in 'messages', but is {_shown(value)}")
    unused |= {
        f"input.{key}" for key, field in value.items() if key not in ("messages", "tools") and not _is_empty(field)
    }
    column = "input.messages"
    messages = _turns({column: value["messages"]}, column, unused)
    return _checked_prompt(messages, column), _tools(value.get("tools"))


def _checked_prompt(messages: list[Message], column: str) -> list[Message]:
    if messages[-1]["role"] in ("assistant", "system"):
        raise _Bad(f"{column!r} ends with a turn of role {messages[-1]['role']}, to which there is nothing to answer")
    return messages


def _side(values: dict[str, Any], column: str, prompt: list[Message], unused: set[str]) -> list[Message]:
    """Returns prompt and answer of one side of a pair: `column` contains both, or only the answer."""
    turns = _as_turns(values, column, "assistant")
    alone = _turns(turns, column, unused)
    if alone[0]["role"] != "assistant" or not prompt:
        return alone
    return _turns(turns, column, unused, prompt)


def _shared_prompt(chosen: list[Message], rejected: list[Message]) -> int:
    """Returns the number of messages in the common prompt."""
    least = min(len(chosen), len(rejected))
    shared = next((n for n in range(least) if chosen[n] != rejected[n]), least)
    if chosen != rejected and not (
        shared < least and chosen[shared]["role"] == rejected[shared]["role"] == "assistant"
    ):
        raise _Bad(
            f"chosen and rejected first differ in turn {shared + 1}, which is not the assistant's in both: they must "
            "answer the same prompt; end them after the first answer in which they differ"
        )
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def _history(value: object) -> list[Message]:
    """Converts Alpaca's earlier turns, pairs of a question and an answer."""
    messages: list[Message] = []
    pairs = _parsed(value, "'history'") if value else []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise _Bad(f"'history' must be a list of pairs [question, answer], but holds {_shown(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _check_media(values: dict[str, Any], messages: list[Message]) -> None:
    """Raises _Bad if the text refers to an image, video or audio column, which cannot be left out."""
    for kind in ("image", "video", "audio"):
        if (values.get(kind) or values.get(f"{kind}s")) and any(f"<{kind}>" in text_of(m["content"]) for m in messages):
            raise _Bad(
                f"its text contains a placeholder for {kind}s (<{kind}>), but only text can be trained on; remove "
                "such rows"
            )


def _role(turn: dict[str, Any], key: str, known: dict[str, str], where: str) -> str:
    role = turn.get(key)
    if role not in known:
        nearest = nearest_names(str(role), known)
        raise _Bad(
            f"{where}: {key} is {_shown(role)}; known are {', '.join(known)}"
            + (f" (nearest: {nearest[0]})" if nearest else "")
        )
    return known[role]


def _sharegpt_turn(messages: list[Message], turn: dict[str, Any], where: str) -> None:
    role = _role(turn, "from", SHAREGPT_ROLES, where)
    value = turn.get("value")
    if not isinstance(value, str):
        raise _Bad(f"{where}: 'value' must be text, but is {_shown(value)}")
    if role == "call":
        _add_calls(messages, "", _parsed(value, f"{where}: the function call"), where)
    elif role == "tool":
        _add_result(messages, {}, value)
    else:
        messages.append({"role": role, "content": value})


def _messages_turn(messages: list[Message], turn: dict[str, Any], where: str) -> None:
    role = _role(turn, "role", ROLES, where)
    calls = turn.get("tool_calls") or turn.get("function_call")  # the latter is OpenAI's older form, of one call
    content = turn.get("content", "" if calls else None)
    if isinstance(content, list):
        content = _parts(content, where)
    if not isinstance(content, str | list):
        raise _Bad(f"{where}: 'content' must be text, but is {_shown(content)}")
    if calls and role == "assistant":
        _add_calls(messages, content, calls, where)
    elif role == "tool":
        _add_result(messages, turn, content)
    else:
        message = {"role": role, "content": content}
        if isinstance(turn.get("reasoning_content"), str):
            message["reasoning_content"] = turn["reasoning_content"]
        messages.append(message)


def _parts(content: list[Any], where: str) -> str | list[dict[str, str]]:
    """Checks text parts as in OpenAI's API. Returns a single part as its text; several are joined by the chat
    template."""
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            raise _Bad(f"{where}: a part of 'content' must be text ({{type: text, text: …}}), but is {_shown(part)}")
    parts = [{"type": "text", "text": part["text"]} for part in content]
    return parts if len(parts) > 1 else "".join(part["text"] for part in parts)


def _add_calls(messages: list[Message], content: str | list[dict[str, str]], calls: object, where: str) -> None:
    """Adds the assistant's calls; directly after text of the assistant they join that turn, as in OpenAI's format."""
    found: list[dict[str, Any]] = []
    count = sum(len(m.get("tool_calls", ())) for m in messages)
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Bad(f"{where}: a function call must be an object with name and arguments, but is {_shown(call)}")
        arguments = _parsed(function.get("arguments") or {}, f"{where}: the arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise _Bad(f"{where}: the arguments of {function['name']} must be an object, but are {_shown(arguments)}")
        _check_json(arguments, f"{where}: the arguments of {function['name']}")
        # Nine letters and digits, as Mistral's templates require.
        name = call.get("id") or f"call{count + len(found):05d}"
        found.append({"id": name, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    last = messages[-1] if messages else {}
    if not content and last.get("role") == "assistant" and "tool_calls" not in last:
        last["tool_calls"] = found
    else:
        messages.append({"role": "assistant", "content": content, "tool_calls": found})


def _add_result(messages: list[Message], turn: dict[str, Any], content: str | list[dict[str, str]]) -> None:
    """Adds the result of a call; without an id, it belongs to the first call that has no result yet."""
    message: Message = {"role": "tool", "content": content}
    calls = [call for m in messages for call in m.get("tool_calls", ())]
    answered = {m.get("tool_call_id") for m in messages}
    call = next(
        (
            c
            for c in calls
            if c["id"] == turn.get("tool_call_id") or ("tool_call_id" not in turn and c["id"] not in answered)
        ),
        None,
    )
    if call:
        message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
    messages.append(message)


def _tools(value: object) -> list[dict[str, Any]] | None:
    tools = _parsed(value, "'tools'") if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise _Bad(f"'tools' must be a list of functions, but is {_shown(tools)}")
    _check_json(tools, "'tools'")
    declared = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    for tool in declared:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise _Bad(f"'tools': a function must be an object with a name, but is {_shown(tool['function'])}")
    return declared
