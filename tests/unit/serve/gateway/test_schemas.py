"""Schemas: what is let through is enforced by xgrammar, what is not is refused with its place."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
import xgrammar
from pydantic import ValidationError
from vllm.exceptions import VLLMValidationError

from llm_ray.serve.gateway.errors import ApiError, invalid
from llm_ray.serve.gateway.requests import Chat
from llm_ray.serve.gateway.schemas import unenforced, unenforced_pattern, unenforced_tag
from tests.schemas import OBEYED, REFUSED

END = 256
COMPILER = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo([bytes([i]) for i in range(END)] + [b"</s>"], stop_token_ids=[END])
)


def accepts(grammar: Any, document: Any) -> bool:
    """Whether an answer may be the document, its properties in any order."""
    orders = itertools.permutations(document.items()) if isinstance(document, dict) else [document]
    for order in orders:
        matcher = xgrammar.GrammarMatcher(grammar)
        if matcher.accept_string(
            json.dumps(dict(order) if isinstance(document, dict) else order)
        ) and matcher.accept_token(END):
            return True
    return False


@pytest.mark.parametrize("name", OBEYED)
def test_what_is_let_through_is_enforced(name: str) -> None:
    schema, right, wrong = OBEYED[name]
    assert unenforced(schema, "s") is None
    grammar = COMPILER.compile_json_schema(json.dumps(schema))
    assert [document for document in right if not accepts(grammar, document)] == []
    assert [document for document in wrong if accepts(grammar, document)] == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_enforced_is_refused_with_its_place(name: str) -> None:
    schema, place = REFUSED[name]
    fault = unenforced(schema, "s")
    assert fault is not None and fault.place == f"s.{place}"


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "^$",
        "a|b",
        "^a$|^b$",
        "(^a$)",
        r"^\d+\.\w-[^\]^$]\$\^$",
        r"^[a-z$^]{2,3}?$",
        r"\u00e9\x41\cA\/\-",
        "^(?:a|(?:b))$",
    ],
)
def test_patterns_that_are_enforced(pattern: str) -> None:
    assert unenforced_pattern(pattern) is None
    COMPILER.compile_regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "a^",
        "a^b",
        "$a",
        "a$b",
        "(a)^b",
        r"\Aa",
        r"a\Z",
        r"\bfoo",
        r"\p{L}",
        r"(a)\k<a>",
        "(?=a)b",
        "(?<n>a)",
        "(?i)a",
        "[[:digit:]]",
    ],
)
def test_patterns_that_are_not(pattern: str) -> None:
    assert unenforced_pattern(pattern)


def refusal(**asked: Any) -> ApiError:
    with pytest.raises(ValidationError) as raised:
        Chat.model_validate({"messages": [{"role": "user", "content": "?"}], **asked})
    return invalid([{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()], asked)


NOT = {"type": "object", "properties": {"a": {"not": {}}}}


def test_the_same_holds_wherever_a_schema_stands() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": NOT}}
    strict = {"type": "function", "function": {"name": "f", "parameters": NOT, "strict": True}}
    good = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": NOT}}
    old = {
        "type": "structural_tag",
        "structures": [{"begin": "<a>", "schema": NOT, "end": "</a>"}],
        "triggers": ["<a>"],
    }
    for asked, param in (
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NOT}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": tag}, "response_format.format.json_schema"),
        ({"response_format": old}, "response_format.structures[0].schema"),
        ({"structured_outputs": {"json": NOT}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(NOT)}}, "structured_outputs.json"),
        ({"tools": [good, tool], "tool_choice": "required"}, "tools[1].function.parameters"),
        (
            {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tools[0].function.parameters",
        ),
        ({"tools": [strict], "tool_choice": "auto"}, "tools[0].function.parameters"),
    ):
        told = refusal(**asked)
        assert (told.status, told.param) == (400, f"{param}.properties.a.not")
        assert told.message.startswith(f"{told.param}: it is not enforced")
    assert refusal(structured_outputs={"regex": "a^b"}).param == "structured_outputs.regex"
    assert unenforced_tag({"type": "regex", "pattern": "a^b"}, "t")


def test_tools_whose_arguments_are_not_held_to_a_schema_may_have_any() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": NOT}}
    free = {"type": "function", "function": {"name": "f", "parameters": NOT, "strict": False}}
    other = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "g"}}
    for asked in (
        {"tools": [tool]},
        {"tools": [tool], "tool_choice": "auto"},
        {"tools": [tool], "tool_choice": "none"},
        {"tools": [free], "tool_choice": "required"},
        {"tools": [tool, other], "tool_choice": named},
    ):
        Chat.model_validate({"messages": [{"role": "user", "content": "?"}], **asked})


def test_a_schema_made_to_take_long_does_not() -> None:
    began = time.monotonic()
    ladder = {
        f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]} for i in range(500)
    } | {"a500": {}}
    assert unenforced({"$defs": ladder, "$ref": "#/$defs/a0"}, "s") is None
    assert unenforced({"$defs": ladder, "oneOf": [{"$ref": f"#/$defs/a{i}"} for i in range(90)]}, "s") is not None
    assert unenforced({"oneOf": [{"const": i} for i in range(5000)]}, "s") is not None
    assert unenforced({"oneOf": [{"enum": [*range(2000)]}, {"enum": [*range(2000, 4000)]}]}, "s") is not None
    assert unenforced_pattern("(" * 10_000) is None
    assert time.monotonic() - began < 2
    deep: Any = {}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    with pytest.raises(VLLMValidationError, match="nested too deeply"):
        unenforced(deep, "s")
