"""Rows of the known shapes made into conversations or texts.

| format | columns (optional ones in brackets) |
| --- | --- |
| alpaca | instruction, output, [input, system] |
| dolly | instruction, response, [context, system] |
| messages | messages: list of {role, content, [tool_calls]}, [tools, system] |
| sharegpt | conversations: list of {from, value}, [tools, system] |
| prompt_completion | prompt, completion, [system] |
| text | text |

A conversation is what chat templates take: roles system, user, assistant and tool; an assistant's ``tool_calls`` in
OpenAI's form with the arguments as an object; ``tools`` as JSON schemas of functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from llm_ray.conf.schema import Data
from llm_ray.data.sources import Row
from llm_ray.errors import ConfError, DataError

Message = dict[str, Any]

# Required columns first: they tell the format. Where a row has the columns of several, the earlier one wins.
REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "alpaca": ("input", "system"),
    "dolly": ("context", "system"),
    "prompt_completion": ("system",),
    "text": (),
}
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
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
    """Plain text to learn whole."""

    text: str


class Formatter:
    """Makes rows into conversations or texts, as ``data.format``, ``data.columns`` and ``data.system`` say.

    With ``format: auto`` each file's format is told by its first good row. ``formats`` collects what was found.
    """

    def __init__(self, data: Data, *, pretrain: bool) -> None:
        self.data, self.pretrain = data, pretrain
        self.formats: list[str] = []
        self._of_file: dict[str, str] = {}
        self._check_columns()

    def __call__(self, row: Row) -> Conversation | Text:
        """The row as a conversation or text. Raises :class:`DataError` that names file and line."""
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

    def _check_columns(self) -> None:
        known = {c for f in (REQUIRED if self.data.format == "auto" else [self.data.format]) for c in (*REQUIRED[f], *OPTIONAL[f])}
        for name in self.data.columns:
            if name not in known:
                nearest = get_close_matches(name, known, n=1)
                raise ConfError(
                    f"data.columns: {name!r} is no column of format {self.data.format}; write {{name in the format: name in your data}}, "
                    f"with the names {', '.join(sorted(known))}" + (f" (nearest: {nearest[0]})" if nearest else "")
                )

    def _rename(self, values: dict[str, Any]) -> dict[str, Any]:
        if not self.data.columns:
            return values
        renamed = dict(values)
        for name, yours in self.data.columns.items():
            if yours not in values:
                raise _Bad(f"no column {yours!r}, which data.columns takes as {name!r}; the row has {_names(values)}")
            if renamed.get(yours) is values[yours]:
                renamed.pop(yours)
            renamed[name] = values[yours]
        return renamed

    def _detect(self, values: dict[str, Any]) -> str:
        if self.pretrain:
            if "text" in values:
                return "text"
            raise _Bad(
                f"tuning.objective pretrain needs a column 'text', the row has {_names(values)}: name yours in data.columns, "
                f"e.g. {{text: {next(iter(values), 'body')}}}"
            )
        if "chosen" in values and "rejected" in values:
            raise _Bad("preference pairs (chosen, rejected), which no objective here learns from; for sft give rows with one answer each")
        for form, required in REQUIRED.items():
            if form != "text" and all(c in values for c in required):
                return form
        if "text" in values:
            raise _Bad("plain text has no answers to learn by tuning.objective sft: use objective pretrain, or another format")
        shapes = "; ".join(f"{f} ({', '.join(r)})" for f, r in REQUIRED.items())
        wanted = [c for r in REQUIRED.values() for c in r]
        near = {c: get_close_matches(str(c).lower(), wanted, n=1, cutoff=0.7) for c in values if c not in wanted}
        hints = [f"{column!r} looks like {match[0]!r}" for column, match in near.items() if match]
        raise _Bad(
            f"cannot tell the format: the row has {_names(values)}; known are {shapes}"
            + (f"; {', '.join(hints)}" if hints else "")
            + ". Name your columns in data.columns, e.g. {instruction: question, output: answer}"
        )

    def _convert(self, form: str, values: dict[str, Any]) -> Conversation | Text:
        missing = [c for c in REQUIRED[form] if values.get(c) is None]
        if missing:
            lacks = " and ".join(f"{c!r}, which is {'null here' if c in values else 'missing'}" for c in missing)
            raise _Bad(f"format {form} needs {lacks}; the row has {_names(values)}")
        if form == "text":
            return Text(_string(values, "text"))
        if form in ("messages", "sharegpt"):
            messages = _turns(values, REQUIRED[form][0])
            tools = _tools(values.get("tools"))
        else:
            question, answer = REQUIRED[form]
            extra = {"alpaca": "input", "dolly": "context"}.get(form)
            more = _string(values, extra) if extra and values.get(extra) is not None else ""
            prompt = "\n\n".join(part for part in (_string(values, question), more) if part.strip())
            messages, tools = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _string(values, answer)}], None
            if not prompt:
                raise _Bad(f"{question!r} is empty")
        if messages[0]["role"] != "system":
            system = _string(values, "system") if values.get("system") else self.data.system
            if system:
                messages.insert(0, {"role": "system", "content": system})
        return Conversation(messages, tools)


class _Bad(Exception):
    """What is wrong with a row; the place is put before it."""


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


def _parsed(value: object, what: str) -> object:
    """CSV, and many data sets, keep lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise _Bad(f"{what} is not JSON: {error.msg} at character {error.pos + 1} of {_shown(value)}") from None


def _turns(values: dict[str, Any], column: str) -> list[Message]:
    turns = _parsed(values[column], repr(column))
    if not isinstance(turns, list) or not turns:
        raise _Bad(f"{column!r} must be a list of turns, but is {_shown(turns)}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {column!r}"
        if not isinstance(turn, dict):
            raise _Bad(f"{where} must be an object, but is {_shown(turn)}")
        # Both spellings are found under both column names.
        add: Callable[[list[Message], dict[str, Any], str], None] = _sharegpt_turn if "from" in turn else _messages_turn
        add(messages, turn, where)
    return messages


def _role(turn: dict[str, Any], key: str, known: dict[str, str], where: str) -> str:
    role = turn.get(key)
    if role not in known:
        nearest = get_close_matches(str(role), known, n=1)
        raise _Bad(f"{where}: {key} is {_shown(role)}; known are {', '.join(known)}" + (f" (nearest: {nearest[0]})" if nearest else ""))
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
    turn = {k: v for k, v in turn.items() if v is not None}  # tables fill up absent keys with nulls
    role = _role(turn, "role", ROLES, where)
    content = turn.get("content", "" if turn.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Bad(f"{where}: 'content' must be text, but is {_shown(content)}")
    if turn.get("tool_calls") and role == "assistant":
        _add_calls(messages, content, turn["tool_calls"], where)
    elif role == "tool":
        _add_result(messages, turn, content)
    else:
        message = {"role": role, "content": content}
        if isinstance(turn.get("reasoning_content"), str):
            message["reasoning_content"] = turn["reasoning_content"]
        messages.append(message)


def _add_calls(messages: list[Message], content: str, calls: object, where: str) -> None:
    """The assistant's calls; right after words of the assistant's they belong to the same turn, as in OpenAI's form."""
    found: list[dict[str, Any]] = []
    count = sum(len(m.get("tool_calls", ())) for m in messages)
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Bad(f"{where}: a function call must be an object with name and arguments, but is {_shown(call)}")
        arguments = _parsed(function.get("arguments") or {}, f"{where}: the arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise _Bad(f"{where}: the arguments of {function['name']} must be an object, but are {_shown(arguments)}")
        # Nine letters and digits: Mistral's templates insist on it.
        name = call.get("id") or f"call{count + len(found):05d}"
        found.append({"id": name, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    last = messages[-1] if messages else {}
    if not content and last.get("role") == "assistant" and "tool_calls" not in last:
        last["tool_calls"] = found
    else:
        messages.append({"role": "assistant", "content": content, "tool_calls": found})


def _add_result(messages: list[Message], turn: dict[str, Any], content: str) -> None:
    """What a call gave back; without an id of its own it answers the first call that has no answer yet."""
    message: Message = {"role": "tool", "content": content}
    calls = [call for m in messages for call in m.get("tool_calls", ())]
    answered = {m.get("tool_call_id") for m in messages}
    call = next((c for c in calls if c["id"] == turn.get("tool_call_id") or ("tool_call_id" not in turn and c["id"] not in answered)), None)
    if call:
        message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
    messages.append(message)


def _tools(value: object) -> list[dict[str, Any]] | None:
    tools = _parsed(value, "'tools'") if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise _Bad(f"'tools' must be a list of functions, but is {_shown(tools)}")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]
