"""Templates: variables, the sandbox, and the lines that rendered text came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llm_ray
from llm_ray.conf.render import TemplateProblem, render, undefined, variables


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("a: {{ x }}", {"x": "text"}, "a: text"),
        ("a: {{ x }}", {"x": True}, "a: true"),
        ("a: {{ x }}", {"x": None}, "a: null"),
        ("a: {{ x }}", {"x": ["p", 1e-5, "q#"]}, 'a: ["p", 1e-05, "q#"]'),
        ("a: {{ x }}", {"x": {"k": "é"}}, 'a: {"k": "é"}'),
        ("a: {{ x | tojson }}", {"x": "a #b"}, 'a: "a #b"'),
        ("a: {{ x | default('d') }}", {}, "a: d"),
        ("a: {{ x | default('d') }}", {"x": "e"}, "a: e"),
        ("{% if x %}\na: 1\n{% else %}\na: 2\n{% endif %}\n", {"x": False}, "a: 2\n"),
        ("{% raw %}a: {{ x }}{% endraw %}", {}, "a: {{ x }}"),
        ("a: {{ x is defined }}", {}, "a: false"),
        ("{% set n = 2 %}\na: {{ n * 3 }}", {}, "a: 6"),
    ],
)
def test_rendering(template: str, values: dict[str, Any], text: str) -> None:
    assert render(template, values).text == text


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_TEST", "there")
    monkeypatch.setenv("items", "a name that a dictionary's method has as well")
    monkeypatch.delenv("LLM_RAY_NOT", raising=False)
    text = render(
        "{{ env.LLM_RAY_TEST }} {{ env('LLM_RAY_TEST', 'd') }} {{ env('LLM_RAY_NOT', 'd') }} {{ env.items }}", {}
    ).text
    assert text == "there there d a name that a dictionary's method has as well"
    assert render("{{ env.LLM_RAY_NOT | default('d') }}", {}).text == "d"
    for template in ("{{ env.LLM_RAY_NOT }}", "{{ env('LLM_RAY_NOT') }}", "{{ env['LLM_RAY_NOT'] }}"):
        (message,) = undefined(render(template, {}).text)
        assert "environment variable LLM_RAY_NOT is not set" in message


def test_the_folder_of_shipped_files() -> None:
    assert render("{{ shipped }}", {}).text == str(Path(llm_ray.__file__).parent)


@pytest.mark.parametrize(
    "template", ["{{ x }}", "{{ x | tojson }}", "{{ x ~ '/data' }}", "{{ '%s/data' | format(x) }}", "{{ [x] }}"]
)
def test_printed_undefined_variables_leave_their_message(template: str) -> None:
    text = render(template, {}).text.encode().decode("unicode_escape" if "tojson" in template else "utf-8")
    (message,) = undefined(text)
    assert "variable x is not set" in message
    assert "--set x=VALUE" in message


@pytest.mark.parametrize(
    "template",
    ["{{ x + 1 }}", "{{ x.y }}", "{% for i in x %}{% endfor %}", "{% if x %}{% endif %}", "{{ x() }}", "{{ x == 1 }}"],
)
def test_undefined_variables_in_expressions_are_errors(template: str) -> None:
    with pytest.raises(TemplateProblem, match="variable x is not set") as caught:
        render(f"a: 1\nb: 2\n{template}\n", {})
    assert caught.value.line == 3


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']['__mro__']",
        "'x' | attr('__class__')",
        "'{0.__class__}'.format(1)",
        "env.__class__",
        "env.__init__.__globals__",
        "env.__call__.__func__",
        "env('HOME').__class__",
        "lipsum.__globals__['os']",
        "cycler.__init__.__globals__",
        "self.__init__",
        "range.__init__",
        "[].append(1)",
        "{}.update(a=1)",
        "x.append(1)",
    ],
)
def test_the_sandbox_holds(expression: str) -> None:
    with pytest.raises(TemplateProblem, match="sandbox forbids") as caught:
        render(f"a: 1\nb: {{{{ {expression} }}}}\n", {"x": []})
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("template", "line", "words"),
    [
        ("a: 1\nb: {% if x %}2", 2, "not a valid Jinja template"),
        ("a: 1\nb: {{ x }\n", 2, "not a valid Jinja template"),
        ("a: 1\n\nb: {{ 1 | nofilter }}\n", 3, "No filter named 'nofilter'"),
        ("a: {{ 1 / 0 }}", 1, "division by zero"),
        ("a: {{ 'x' + 1 }}", 1, "an expression in the template failed"),
        ("a: {{ range(10 ** 9) }}", 1, "Range too big"),
        ("a: 1\n{% include 'passwd' %}\n", 2, "a conf is one file"),
        ("{% import 'os' as os %}\n", 1, "a conf is one file"),
        ("{% extends 'x' %}\n", 1, "a conf is one file"),
    ],
)
def test_problems_have_a_line(template: str, line: int, words: str) -> None:
    with pytest.raises(TemplateProblem) as caught:
        render(template, {})
    assert words in caught.value.message
    assert caught.value.line == line


def test_lines_of_the_template() -> None:
    rendered = render(
        "{# a comment\nover two lines #}\nname: a\n{% if big %}\nworkers: 9\n{% endif %}\nstages:\n"
        "{% for s in stages %}\n  - {{ s }}\n{% endfor %}\ndata: {{ more }}\nlast: {{ '' -}}\n\n  end\n",
        {"big": False, "stages": ["a", "b"], "more": "|\n  x\n  y"},
    )
    lines = rendered.text.split("\n")
    origins = {text: rendered.origin(i) for i, text in enumerate(lines, 1) if text}
    assert origins == {
        "name: a": 3,
        "stages:": 7,
        "  - a": 9,
        "  - b": 9,
        "data: |": 11,
        "  x": 11,
        "  y": 11,
        "last: end": 12,
    }


def test_variables_that_a_template_uses() -> None:
    assert variables(
        "{{ a }} {{ b | default(c) }} {% set d = 1 %}{{ d }} {{ env.X }} {{ shipped }} {% for e in range(f) %}{{ e "
        "}}{% endfor %}"
    ) == set("abcf")
