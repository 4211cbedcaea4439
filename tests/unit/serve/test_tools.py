"""Tools told to a model whose template knows none."""

from __future__ import annotations

from llm_ray.serve.tools import knows_tools, tell_tools

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_a_template_that_writes_tools_is_left_alone() -> None:
    assert knows_tools("{% if tools %}…{% endif %}")
    assert not knows_tools("{% for message in messages %}…{% endfor %}")


def test_the_tools_are_told_in_the_system_message() -> None:
    (system, user) = tell_tools([{"role": "user", "content": "Rain?"}], [TOOL])
    assert system["role"] == "system"
    assert '"name": "weather"' in system["content"]
    assert user == {"role": "user", "content": "Rain?"}
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
    assert tell_tools([{"role": "user", "content": "Rain?"}], [strict])[0] == system
    (system, _) = tell_tools([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}], [TOOL])
    assert system["content"].startswith("Be brief.\n\n")
    assert '"name": "weather"' in system["content"]


def test_calls_and_results_become_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    told = tell_tools(
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
        ],
        [TOOL],
    )
    assert told[1] == {"role": "assistant", "content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'}
    assert told[2] == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}


def test_without_tools_nothing_is_told() -> None:
    assert tell_tools([{"role": "tool", "content": "rain"}], []) == [{"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}]
