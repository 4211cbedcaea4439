"""Tools for models whose chat template knows none: they are told of them in the system message, in Hermes' form.

Most templates of today write the tools into the prompt themselves. A model whose template does not would never see them; it is told in
words, and its answer is read by vLLM's `hermes` parser. Form: NousResearch/Hermes-Function-Calling, as in the templates of Qwen2.5.
"""

from __future__ import annotations

import json
from typing import Any

_BEFORE = "You may call one or more functions to help with the user's query. The functions are described within <tools></tools>:\n<tools>\n"
_AFTER = (
    "\n</tools>\n\nTo call a function, write a JSON object with its name and arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <arguments>}\n</tool_call>'
)


def knows_tools(template: str) -> bool:
    """Whether a chat template writes the tools of a request into the prompt."""
    return "tools" in template


def tell_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the tools told in its system message, and calls and results as text in the same form."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    told = _BEFORE + "\n".join(json.dumps(_described(tool), ensure_ascii=False) for tool in tools) + _AFTER
    if plain and plain[0]["role"] == "system" and isinstance(plain[0]["content"], str):
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool without what is for the engine alone."""
    return {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message that a template without tools understands."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"}
    if calls := message.get("tool_calls"):
        written = "\n".join(
            f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"])}, "arguments": {call["function"].get("arguments") or "{}"}}}\n</tool_call>'
            for call in calls
        )
        return {"role": "assistant", "content": "\n".join(filter(None, [_text(message.get("content")), written]))}
    return message


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""
