"""Renders a conf template to YAML text with sandboxed Jinja; undefined variables are errors.

A template sees the given variables (``--vars``, ``--set``), ``env`` (``env.HOME``, ``env("HF_HOME", "a default")``) and
``shipped``, the folder of this package's bundled files. Values other than text are written as JSON, which is valid
YAML.

    render("name: {{ name }}\nworkers: {{ workers | default(2) }}", {"name": "trial"})

Marks in the rendered text carry two kinds of information: the template's line number of each line, and undefined
variables. So all undefined variables can be reported at once with their keys, except those in comments or for keys that
``--set`` overrides.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, StrictUndefined, TemplateNotFound, TemplateSyntaxError, Undefined, meta
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing

import llm_ray

# Private-use characters, which do not occur in confs, enclose a line number or the message about an undefined variable.
# If several marks precede the same text, the last one applies: the others are from lines with only tags.
_LINE = re.compile("(?:\ue000([0-9]+)\ue001)+")
_UNDEFINED = re.compile("\ue002([0-9a-f]*)\ue003")
RESERVED = ("env", "shipped")


class TemplateProblem(Exception):
    """An error in a template, with its line (from 1)."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


@dataclass(frozen=True)
class Rendered:
    """YAML text, and the template's line number of each of its lines."""

    text: str
    lines: tuple[int, ...]

    def origin(self, line: int) -> int:
        """Returns the template's line (from 1) for a line of the text (from 1)."""
        return self.lines[min(line, len(self.lines)) - 1]


class _Undefined(StrictUndefined):
    """Raises on any use, except that printing it yields a mark with its message."""

    @property
    def _undefined_message(self) -> str:
        if self._undefined_hint or self._undefined_obj is not missing:
            return super()._undefined_message
        name = self._undefined_name
        return f"the template's variable {name} is not set: give it with --set {name}=VALUE or in a --vars file"

    def _mark(self) -> str:
        if self._undefined_exception is not UndefinedError:  # rejected by the sandbox
            self._fail_with_undefined_error()
        return f"\ue002{self._undefined_message.encode().hex()}\ue003"

    __str__ = _mark  # type: ignore[assignment]


class _Environ:
    """The process's environment variables, read-only and without methods that could shadow a variable's name."""

    def __getitem__(self, name: str) -> str | Undefined:
        return os.environ.get(
            name,
            _Undefined(f"the environment variable {name} is not set: set it, or give a default: env('{name}', '…')"),
        )

    def __call__(self, name: str, default: object = None) -> object:
        return self[name] if default is None else os.environ.get(name, default)


class _MarkLines(Extension):
    """Inserts a line-number mark before each line, or part of a line, of the template's literal text."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for token in stream:
            if token.type == "data":
                marked = [
                    f"\ue000{line}\ue001{text}" for line, text in enumerate(token.value.split("\n"), token.lineno)
                ]
                yield Token(token.lineno, "data", "\n".join(marked))
            else:
                yield token


def _print(value: object) -> object:
    return value if isinstance(value, (str, Undefined)) else json.dumps(value, ensure_ascii=False, default=str)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=_Undefined,
        finalize=_print,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=[_MarkLines],
        loader=DictLoader({}),
    )
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": True,
        "default": str,
    }  # lets tojson print marks of undefined variables
    environment.globals.update(env=_Environ(), shipped=str(Path(llm_ray.__file__).parent))
    return environment


def undefined(text: str) -> list[str]:
    """Returns the messages of the undefined variables that were printed into `text`."""
    return [bytes.fromhex(message).decode() for message in _UNDEFINED.findall(text)]


def without_marks(text: str) -> str:
    """Returns the text with an ellipsis for each undefined variable."""
    return _UNDEFINED.sub("…", text)


def variables(template: str) -> set[str]:
    """Returns the names of the variables that a template uses. Raises :class:`TemplateProblem` for a syntax error."""
    environment = _environment()
    try:
        return meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
    except TemplateSyntaxError as error:
        raise TemplateProblem(f"is not a valid Jinja template: {error.message}", error.lineno) from error


def render(template: str, values: Mapping[str, Any]) -> Rendered:
    """Returns the rendered template; undefined variables leave marks, which :func:`undefined` reads.

    Raises :class:`TemplateProblem`.
    """
    try:
        compiled = _environment().from_string(template)
        text = compiled.render(values)
    except TemplateSyntaxError as error:
        raise TemplateProblem(f"is not a valid Jinja template: {error.message}", error.lineno) from error
    except UndefinedError as error:
        raise TemplateProblem(str(error.message), _line(error)) from error
    except SecurityError as error:
        raise TemplateProblem(f"the template uses something the sandbox forbids: {error}", _line(error)) from error
    except TemplateNotFound as error:
        raise TemplateProblem(
            "include, import and extends are not supported: a conf is one file", _line(error)
        ) from error
    except Exception as error:  # expressions may raise anything: a division by zero, a missing filter argument, …
        raise TemplateProblem(f"an expression in the template failed: {error}", _line(error)) from error
    lines, origins, origin = [], [], 1
    for line in text.split("\n"):
        if mark := _LINE.search(line):
            origin = int(mark[1])
        lines.append(_LINE.sub("", line))
        origins.append(origin)
    return Rendered("\n".join(lines), tuple(origins))


def _line(error: Exception) -> int:
    """Returns the template's line in which `error` was raised, from the traceback entry that Jinja adds."""
    line, trace = 1, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
