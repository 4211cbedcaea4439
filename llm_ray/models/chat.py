"""Turns a conversation into a prompt, the same way for training, evaluation and serving.

    template = ChatTemplate(tokenizer)
    prompt = template.render(*template.adapt(messages, tools), prompt=True)

In serving, vLLM's front end rewrites messages before the chat template sees them. The text rendered here is, token for
token, the prompt that a server computes from the same messages; a test compares the two.

Messages are those of OpenAI's chat API: role, content (text, or a list of parts ``{"type": "text", "text": …}``),
tool_calls, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tool = dict[str, Any]

# The format of tools and calls in Qwen 2.5 and the Hermes models; vLLM's tool parser `hermes` reads it.
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
class Form:
    """What a chat template supports, found by rendering probe conversations."""

    takes_parts: bool
    """Content as a list of parts, not only as text."""
    knows_tools: bool
    """Tools (if any are given), calls and their results."""
    whole_system: bool
    """System messages of several parts; otherwise only the first part is rendered."""


class ChatTemplate:
    """A tokenizer's chat template, applied as a server applies it. The tokenizer must have one.

    There may be two templates, `default` and `tool_use` (for conversations with tools). `forms` maps whether tools are
    given to the support of the template then used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.forms = {given: self._tried(given) for given in (False, True)}

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, prompt: bool) -> str:
        """Returns the conversation as text; with `prompt`, ready for the assistant's next answer. Raises what the
        template raises."""
        return self._rendered(messages, tools, self.forms[bool(tools)].takes_parts, prompt)

    def adapt(self, messages: list[Message], tools: list[Tool] | None) -> tuple[list[Message], list[Tool] | None]:
        """Returns messages and tools in a form that the template supports: unchanged, rewritten by :func:`tell_tools`,
        or with the parts of a system message joined."""
        if self.in_words(messages, tools):
            messages, tools = tell_tools(messages, tools or []), None
        return self.with_whole_system(messages, tools), tools

    def in_words(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> bool:
        """Whether :func:`tell_tools` has to rewrite the conversation's tools, calls or results as text."""
        calls = any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
        return bool(tools or calls) and not self.forms[bool(tools)].knows_tools

    def with_whole_system(self, messages: list[Message], tools: Sequence[Tool] | None) -> list[Message]:
        """Returns the messages, with a system message's parts joined if the template would render only the first
        part."""
        if self.forms[bool(tools)].whole_system:
            return messages
        return [
            m | {"content": text_of(m["content"])}
            if m["role"] == "system" and isinstance(m.get("content"), list)
            else m
            for m in messages
        ]

    @property
    def takes_parts(self) -> bool | None:
        """Whether the template takes content as a list of parts; None if that differs with and without tools."""
        with_tools, without = self.forms[True].takes_parts, self.forms[False].takes_parts
        return without if with_tools == without or self.alone else None

    @property
    def alone(self) -> str | None:
        """The template to use for all conversations, if there is one for tools that does not render them completely;
        else None."""
        templates = self._tokenizer.chat_template
        return templates.get("default") if isinstance(templates, dict) and not self.forms[True].knows_tools else None

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Tool] | None, parts: bool, prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [_as_served(message, parts) for message in messages],
                tools=[_as_declared(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )

    def _tried(self, with_tools: bool) -> Form:
        parameters = {"type": "object", "properties": {}}
        tool = {
            "type": "function",
            "function": {"name": "probe_tool", "description": "tries out", "parameters": parameters},
        }
        tools = [tool] if with_tools else None
        words = [["probe_one", "probe_two"], ["probe_three", "probe_four"]]
        contents = [[{"type": "text", "text": word} for word in pair] for pair in words]
        asked, answered = (
            {"role": role, "content": content} for role, content in zip(("user", "assistant"), contents, strict=True)
        )
        system = {
            "role": "system",
            "content": [{"type": "text", "text": word} for word in ("probe_first", "probe_second")],
        }
        call = {
            "id": "call00000",
            "type": "function",
            "function": {"name": "probe_call", "arguments": {"key": "probe_argument"}},
        }
        calls: list[Message] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "probe_result", "tool_call_id": "call00000", "name": "probe_call"},
            {"role": "assistant", "content": "answer"},
        ]

        def written(messages: list[Message], parts: bool | None) -> str:
            try:
                if parts is not None:
                    return self._rendered(messages, tools, parts, prompt=False)
                return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))  # unchanged
            except Exception:  # templates reject input by raising
                return ""

        text = written([asked, answered], None)
        # A template for text may also write the list as Python or JSON does.
        parts = all(
            word in text and f"'{word}'" not in text and f'"{word}"' not in text for pair in words for word in pair
        )
        probes = ["probe_call", "probe_argument", "probe_result", *(["probe_tool"] if with_tools else [])]
        called, instructed = written(calls, parts), written([system, asked, answered], parts)
        whole = "probe_first" not in instructed or "probe_second" in instructed
        return Form(parts, all(probe in called for probe in probes), whole)


def text_of(content: object) -> str:
    """Returns a message's content as one text, its parts joined by newlines, as vLLM does for templates that take
    text."""
    return "\n".join(_texts(content))


def tell_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Rewrites a conversation for a template without tool support, in the format of Qwen 2.5 and Hermes.

    Tools are described in the system message, calls become the assistant's text, and results become user messages.
    """
    rewritten: list[Message] = []
    rest = list(messages)
    if tools:
        system = TOOLS.format(tools="\n".join(json.dumps(_described(tool), ensure_ascii=False) for tool in tools))
        if rest and rest[0]["role"] == "system":
            system = f"{text_of(rest.pop(0).get('content'))}\n\n{system}"
        rewritten.append({"role": "system", "content": system})
    before = None
    for message in rest:
        role = message["role"]
        if role == "tool":
            content = TOOL_RESPONSE.format(content=text_of(message.get("content")))
            if before == "tool":
                rewritten[-1]["content"] += "\n" + content
            else:
                rewritten.append({"role": "user", "content": content})
        elif calls := message.get("tool_calls"):
            written = [
                TOOL_CALL.format(call=json.dumps(_called(call["function"]), ensure_ascii=False)) for call in calls
            ]
            content = "\n".join(part for part in (text_of(message.get("content")), *written) if part)
            rewritten.append(
                {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
            )
        else:
            rewritten.append(message)
        before = role
    return rewritten


def as_learnt(messages: Sequence[Message]) -> list[Message]:
    """Returns a request's messages as training data has them: fixed key order in calls, and the function's name in
    results.

    Otherwise templates that write a whole call as JSON would render history differently than in training.
    """
    names: dict[str, str] = {}
    learnt: list[Message] = []
    for message in messages:
        added: Message = {}
        if calls := message.get("tool_calls"):
            names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
            added["tool_calls"] = [
                _ordered(call, "id", "type") | {"function": _ordered(call["function"], "name", "arguments")}
                for call in calls
            ]
        elif message["role"] == "tool" and (name := message.get("name") or names.get(message.get("tool_call_id", ""))):
            added["name"] = name
        learnt.append(message | added)
    return learnt


# Inside ---------------------------------------------------------------------------------------------------------------


def _texts(content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part if isinstance(part, str) else part.get("text") or "" for part in parts if isinstance(part, str | dict)]


def _as_served(message: Message, parts: bool) -> Message:
    """Returns a message as vLLM passes it to the template (``vllm.renderers.chat_utils``)."""
    role, content = message["role"], message.get("content")
    calls = message.get("tool_calls")
    texts = [] if calls and not content else _texts(content)
    wrapped = parts and role != "tool"
    served: Message = {
        "role": role,
        "content": [{"type": "text", "text": t} for t in texts] if wrapped else "\n".join(texts),
    }
    served |= {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
    if calls:
        served["tool_calls"] = calls
    if reasoning := message.get("reasoning_content"):
        served |= {"reasoning": reasoning, "reasoning_content": reasoning}
    return served


def _as_declared(tool: Tool) -> Tool:
    """Returns a tool as vLLM passes it to the template: the fields of OpenAI's API, absent ones null."""
    function = tool["function"]
    declared = {key: function.get(key) for key in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        declared["strict"] = function["strict"]
    return {"type": "function", "function": declared}


def _described(tool: Tool) -> Tool:
    """Returns a tool without null fields and without `strict`, which only the engine reads."""
    function = _as_declared(tool)["function"]
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None and key != "strict"},
    }


def _ordered(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _called(function: dict[str, Any]) -> dict[str, Any]:
    """Returns a call's name and arguments. Arguments that are not a JSON object become empty, as in vLLM."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = None
    return {"name": function["name"], "arguments": arguments if isinstance(arguments, dict) else {}}
