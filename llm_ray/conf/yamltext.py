"""YAML in and out: numbers as in YAML 1.2 (``1e-3`` is one), duplicate keys rejected, and the line of every key
recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

Path: TypeAlias = tuple[str | int, ...]

# PyYAML follows YAML 1.1, where `1e-3` is text, `no` is false, `010` is eight and `2024-01-01` is a date. These are the
# core types of YAML 1.2.
RESOLVERS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML requires a class attribute)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type, so that any reader reads it back as text."""


for _tag, (_pattern, _first) in RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class Problem(Exception):
    """An error in the YAML, with its line (from 1)."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


@dataclass(frozen=True)
class Document:
    """The data, the line of each key or list item by its path, and scalars as written."""

    data: Any
    lines: dict[Path, int]
    written: dict[Path, str]

    def line(self, path: Path) -> int | None:
        """Returns the line of `path`, or of its nearest ancestor that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def parse(text: str) -> Document:
    """Returns data and lines of one YAML document. Raises :class:`Problem`."""
    lines: dict[Path, int] = {}
    written: dict[Path, str] = {}
    walked: dict[int, Path] = {}

    def walk(node: yaml.Node, path: Path) -> None:
        if id(node) in walked:  # an alias of a visited anchor
            anchor = walked[id(node)]
            if path[: len(anchor)] == anchor:
                raise Problem(f"{'.'.join(map(str, path))} is an alias (*) of an enclosing value", lines[path])
            return
        walked[id(node)] = path
        if isinstance(node, yaml.ScalarNode):
            written[path] = node.value
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[*path, index] = item.start_mark.line + 1
                walk(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            here: set[str] = set()
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in here:
                    where = ".".join(map(str, (*path, name)))
                    raise Problem(f"{where} appears twice (first in line {lines[*path, name]}): keep one", line)
                here.add(name)
                lines[*path, name] = line
                walk(value, (*path, name))

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None, lines, written)
        walk(node, ())
        return Document(loader.construct_document(node), lines, written)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Problem(_words(error), mark.line + 1 if mark else 1) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Problem(f"contains the control character {chr(int(error.character))!r}: remove it", line) from error


def value(text: str) -> Any:
    """Returns one YAML value, as in ``--set key=VALUE``. Raises :class:`Problem`."""
    return parse(text).data


def dump(data: Any) -> str:
    """Returns YAML text that both :func:`parse` and YAML 1.1 readers read back as `data`."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem:
        return "is not valid YAML: indent with spaces, not tabs"
    if "expected a single document" in (error.context or ""):
        return "contains more than one YAML document (---): keep one"
    if "undefined alias" in problem or "could not determine a constructor" in problem:
        return f"is not valid YAML for a conf: {problem}: quote text that begins with * or !"
    hint = {
        "mapping values are not allowed here": "quote text that contains ': ', or fix the indentation here",
        "could not find expected ':'": "a key needs a colon and a space after it",
        "expected <block end>, but found '<block mapping start>'": "this line is indented further than its neighbours",
        "found unexpected end of stream": "a quote or bracket opened here or above is never closed",
    }.get(problem.strip())
    context = f" ({error.context})" if error.context else ""
    return f"is not valid YAML: {problem}{context}" + (f": {hint}" if hint else "")
