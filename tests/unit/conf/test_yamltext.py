"""YAML in and out: types as in version 1.2, lines, duplicates, round trips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.conf import yamltext


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2E-5", 2e-5),
        ("-1e+3", -1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("1.5e3", 1500.0),
        ("3", 3),
        ("-3", -3),
        ("0x1f", 31),
        ("0o17", 15),
        ("010", "010"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("e5", "e5"),
        (".inf", math.inf),
        ("[a, 1e-3]", ["a", 0.001]),
        ("{a: 1}", {"a": 1}),
        ("a/b-c.jsonl", "a/b-c.jsonl"),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = yamltext.value(text)
    assert found == value
    assert type(found) is type(value)


def test_lines_of_keys_and_items() -> None:
    document = yamltext.parse("a: 1\nb:\n  c: 2\n\n  d:\n    - x\n    - y: 3\n")
    assert document.lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "d"): 5,
        ("b", "d", 0): 6,
        ("b", "d", 1): 7,
        ("b", "d", 1, "y"): 7,
    }
    assert document.line(("b", "d", 7, "z")) == 5
    assert document.line(("z",)) is None


def test_anchors_and_merges() -> None:
    assert yamltext.parse("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n").data["b"] == {"p": 1, "q": 3}


def test_anchors_are_not_unrolled() -> None:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert len(yamltext.parse(laughs).lines) < 1000


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a appears twice (first in line 1)"),
        ("s:\n  a: 1\n  a: 1", 3, "s.a appears twice (first in line 2)"),
        ("a:\n\tb: 1", 2, "indent with spaces, not tabs"),
        ("a: b: c", 1, "quote text that contains"),
        ("a: [1, 2\nb: 3", 2, "is not valid YAML"),
        ("a: 'x\nb: 2", 2, "never closed"),
        ("a: 1\n---\nb: 2", 2, "more than one YAML document"),
        ("a: *x", 1, "undefined alias"),
        ("a: 1\nb: !!python/object/apply:os.system [id]", 2, "could not determine a constructor"),
        ("a: 1\nb: \x01", 2, "control character"),
        ("? [a]\n: 2", 1, "unhashable key"),
    ],
)
def test_problems_have_a_line(text: str, line: int, words: str) -> None:
    with pytest.raises(yamltext.Problem) as caught:
        yamltext.parse(text)
    assert caught.value.line == line
    assert words in caught.value.message


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Co", "Cn"]))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner))


@given(VALUES)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    assert yamltext.parse(yamltext.dump(value)).data == value


@pytest.mark.parametrize(
    "text",
    ["1e-3", "no", "yes", "010", "2024-01-01", "0o17", "1:30", "null", "", "1_000", "<<", "=", "a: b", "# a", "é"],
)
def test_text_stays_text_for_readers_of_yaml_1_1_too(text: str) -> None:
    assert yaml.safe_load(yamltext.dump({"a": text})) == {"a": text}
    assert yamltext.parse(yamltext.dump({"a": text})).data == {"a": text}
