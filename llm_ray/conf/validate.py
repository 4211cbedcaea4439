"""Validation of a conf, from YAML to schema: overrides by ``--set``, absolute paths, and error messages.

All errors are reported in one :class:`~llm_ray.errors.ConfError`, each with file, line, key and remedy. Subclasses for
each kind of conf are in ``llm_ray.conf.load``.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llm_ray.conf import keys, yamltext
from llm_ray.conf.keys import C, Keys
from llm_ray.conf.render import Rendered, undefined, without_marks
from llm_ray.conf.section import Paths
from llm_ray.errors import ConfError
from llm_ray.nearest import nearest_names

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Setting:
    """A key given with ``--set``: the paths it may refer to (several if model names contain dots), and the option as
    written."""

    paths: list[yamltext.Path]
    value: Any
    text: str

    @property
    def path(self) -> yamltext.Path:
        """The path it refers to."""
        return self.paths[0]


class Validation(ABC, Generic[C]):
    """One conf, the origin of each of its keys, and its errors."""

    def __init__(
        self,
        keys: Keys[C],
        file: Path,
        shipped: bool,
        rendered: Rendered,
        document: yamltext.Document,
        settings: list[Setting],
        home: Path,
    ) -> None:
        self.keys = keys
        self.file = file
        self.rendered = rendered
        self.document = document
        self.home = home
        self.data: dict[str, Any] = document.data
        # Among the paths a setting may refer to, those of models in the conf come first.
        self.settings = [
            replace(setting, paths=sorted(setting.paths, key=lambda path: path[:2] not in document.lines))
            for setting in settings
        ]
        self.here = Path.cwd()
        self.beside = self.here if shipped else file.absolute().parent
        self.wrong: list[tuple[int, str]] = []  # line (0: not in the file) and message
        self.unset: tuple[yamltext.Path, ...] = ()  # keys with undefined variables

    @abstractmethod
    def resolve(self, conf: C) -> C:
        """Returns the conf with absolute paths of the files it names; complains about missing ones."""

    def conf(self) -> C:
        """Returns the conf. Raises :class:`ConfError` with all errors."""
        for setting in self.settings:
            self._set(setting)
        unset = dict(_undefined(self.data, ()))
        for path, messages in unset.items():
            self.complain(path, f"{without_marks(dotted(path))}: {'; '.join(messages)}")
        self.unset = tuple(unset)
        self._absolute(self.data, ())
        try:
            conf = self.keys.model.model_validate(self._at_home())
        except ValidationError as error:
            details: dict[yamltext.Path, ErrorDetails] = {}
            for detail in error.errors(include_url=False):
                details.setdefault(self._path(detail), detail)
            for path, detail in details.items():
                self._explain(path, detail)
        else:
            conf = self.resolve(conf)
        if self.wrong:
            raise error_of([message for _, message in sorted(self.wrong, key=lambda entry: entry[0])])
        return conf

    def _at_home(self) -> dict[str, Any]:
        """Returns the data with folders of `home` for unset paths, whose defaults in the schema depend on the
        environment."""
        given = self.data.get("paths", {})
        if not isinstance(given, dict):
            return self.data  # the schema reports it
        return self.data | {"paths": Paths.of(self.home).model_dump() | given}

    # Places -----------------------------------------------------------------------------------------------------------

    def _setting(self, path: yamltext.Path) -> Setting | None:
        """Returns the ``--set`` that `path` came from, or that created it as a section."""
        for setting in reversed(self.settings):
            made = path and path not in self.document.lines and setting.path[: len(path)] == path
            if made or path[: len(setting.path)] == setting.path:
                return setting
        return None

    def complain(self, path: yamltext.Path, message: str) -> None:
        """Records an error at `path` with its location, unless the value is only the mark of an undefined variable."""
        if any(path[: len(key)] == key for key in self.unset):
            return
        setting, line = self._setting(path), self.document.line(path)
        if setting:
            self.wrong.append((0, f"{setting.text}: {message}"))
        elif line:
            line = self.rendered.origin(line)
            self.wrong.append((line, f"{self.file}:{line}: {message}"))
        else:
            self.wrong.append((0, f"{self.file}: {message}"))

    def _path(self, detail: ErrorDetails) -> yamltext.Path:
        """Returns the path in the data of a validation error: pydantic's without the names of union alternatives."""
        path: list[str | int] = []
        node: Any = self.data
        for part in detail["loc"]:
            inner: dict[str | int, Any] = dict(enumerate(node)) if isinstance(node, list) else {}
            if isinstance(node, dict):
                inner = {str(key): value for key, value in node.items()}
            place = str(part) if isinstance(node, dict) else part
            if place in inner or (detail["type"] in ("missing", "invalid_key") and part == detail["loc"][-1]):
                path.append(place)
                node = inner.get(place)
        return tuple(path)

    # What --set and relative paths change -----------------------------------------------------------------------------

    def _set(self, setting: Setting) -> None:
        node = self.data
        for part in map(str, setting.path[:-1]):
            inner = node.get(part)
            if inner is not None and not isinstance(inner, dict):
                return  # the schema reports it
            node[part] = dict(inner or {})  # a copy: an alias may share this section
            node = node[part]
        node[str(setting.path[-1])] = setting.value

    def _absolute(self, node: dict[str, Any], path: yamltext.Path) -> None:
        """Makes files and folders absolute before the schema would resolve them against the current folder."""
        for name, value in node.items():
            key = self.keys.key((*path, name))
            if key and isinstance(value, dict):
                self._absolute(value, (*path, name))
            elif key and key.is_path and isinstance(value, str):
                node[name] = self.path((*path, name), value)

    def path(self, path: yamltext.Path, name: str) -> str:
        """Returns the absolute path of the file or folder named at `path`."""
        candidates = self.candidates(path, name)
        return str(next((file for file in candidates if safely(file.exists)), candidates[0]))

    def candidates(self, path: yamltext.Path, name: str) -> list[Path]:
        """Returns the paths to look up for the file or folder named at `path`, in this order."""
        folders = [self.here] if self._setting(path) else [self.beside, self.here]
        return list(dict.fromkeys(folder / expand(name) for folder in folders))

    def must_be_file(self, path: yamltext.Path, file: Path | None) -> None:
        """Complains if the file does not exist."""
        if file and not safely(file.is_file):
            self.complain(path, f"{dotted(path)}: no such file: {file}")

    def folder(self, path: yamltext.Path, name: str, files: tuple[str, ...] = MODEL_FILES) -> str:
        """Returns the absolute path of a model's folder, recognized by any of `files`; names in the registry, of a run
        or on the hub are unchanged."""
        candidates = self.candidates(path, name)
        explicit = expand(name).is_absolute() or name.startswith(("./", "../"))
        for folder in candidates:
            # Skip a folder that merely has the same name as a model in the registry.
            if safely(folder.is_dir) and (explicit or any(safely((folder / file).exists) for file in files)):
                return str(folder)
        if explicit:
            self.complain(path, f"{dotted(path)}: no such folder: {' or '.join(map(str, candidates))}")
        return name

    # Words ------------------------------------------------------------------------------------------------------------

    def _explain(self, path: yamltext.Path, detail: ErrorDetails) -> None:
        """Records a validation error in the user's terms."""
        value, kind = detail["input"], detail["type"]
        if kind == "missing" and isinstance(path[-1], int):  # a list is too short: report the list
            path, kind = path[:-1], "too_few"
        name = dotted(path)
        if kind == "missing":
            if self.keys.named(path) and path[:2] not in self.document.lines:
                self._not_there(path)
                return
            key = self.keys.key(path)
            generic = key.name if key else name
            for needed in self.keys.needed(generic):
                full = name + needed.name.removeprefix(generic)
                self.complain(
                    path, f"{full} is missing: {keys.first_sentence(needed.text)} Add it, or give --set {full}=…"
                )
        elif kind == "value_error":
            section = path[:2] if self.keys.named(path) else ()
            for text in str(detail["ctx"]["error"]).split("\n"):
                self.complain(self._about(section, text) or path, f"{dotted(section)}: {text}".removeprefix(": "))
        elif detail["loc"][-1] == "[key]":
            self.complain(
                (*path[:-1], str(path[-1])),
                f"{dotted(path[:-1])}: the name {path[-1]} must be text: put it in quotes: '{path[-1]}'",
            )
        elif kind in ("extra_forbidden", "invalid_key"):
            above = self.keys.key(path[:-1])
            here = ", ".join(key.leaf for key in self.keys.below(above.name if above else ""))
            if self.keys.paths(name):  # a dotted key, as for --set
                outer, _, leaf = name.rpartition(".")
                hint = f"in a file it is {leaf}: indented below {outer}:"
            elif nearest := self.keys.nearest(path):
                hint = f"did you mean {nearest}?"
            else:
                hint = f"{dotted(path[:-1]) or 'a conf'} has the keys {here}"
            self.complain(path, f"{name}: no such key; {hint}")
        elif kind in ("string_pattern_mismatch", "string_too_short", "too_short"):
            key = self.keys.key(path)
            self.complain(
                path, f"{name} is {show(value) if value else 'empty'}, which is not allowed. {key.text if key else ''}"
            )
        else:
            node = self._schema(path)
            must = keys.describe(node)
            hint = ""
            if must.startswith(("a section", "keys with values")):
                must = f"a section with keys indented below {name}:"
                if isinstance(value, str) and re.match(r"\w+:\S", value):
                    hint = f" ({value.partition(':')[0]}: needs a space after the colon)"
            elif must.startswith("text") and isinstance(value, (bool, int, float)):
                hint = f": put it in quotes: '{self.document.written.get(path, value)}'"
            elif close := nearest_names(str(value), keys.choices(node)):
                hint = f"; did you mean {close[0]}?"
            self.complain(path, f"{name} is {show(value)}: it must be {must}{hint}")

    def _not_there(self, path: yamltext.Path) -> None:
        """Complains about an incomplete section that is only given by ``--set``."""
        section = dotted(path[:2])
        others = [dotted(line) for line in self.document.lines if len(line) == 2 and line[0] == path[0]]
        has = ", ".join(others) or "none"
        self.complain(path[:2], f"the conf has no {section} (it has {has}); to add it, give --set {dotted(path)}=… too")

    def _about(self, section: yamltext.Path, message: str) -> yamltext.Path | None:
        """Returns the first key in a rule's message (relative to `section`) that the user has set."""
        given = [
            path
            for path in [*self.document.lines, *(s.path for s in self.settings)]
            if path[: len(section)] == section != path
        ]
        found = []
        for path in given:
            name = dotted(path[len(section) :])
            at = re.search(rf"(?<![\w.]){re.escape(name)}(?![\w/-]|\.\w)", message)
            if at and ("." in name or at.start() == 0):  # otherwise it is an ordinary word
                found.append((at.start(), path))
        return min(found, key=lambda entry: entry[0])[1] if found else None

    def _schema(self, path: yamltext.Path) -> dict[str, Any]:
        """Returns the JSON Schema of the value at `path`."""
        length, key = next((i, key) for i in range(len(path), 0, -1) if (key := self.keys.key(path[:i])))
        for option in [key.schema, *key.schema.get("anyOf", ())]:
            inner = option.get("additionalProperties") or option.get("items")
            if inner and length < len(path):
                return inner if isinstance(inner, dict) else {}
        return key.schema


def _undefined(node: Any, path: yamltext.Path) -> Iterator[tuple[yamltext.Path, list[str]]]:
    """Yields the paths of keys and values with undefined variables, and their messages."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _undefined(str(key), (*path, key))
            yield from _undefined(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _undefined(value, (*path, i))
    elif isinstance(node, str) and (messages := undefined(node)):
        yield path, messages


def expand(name: str | Path) -> Path:
    """Returns the path with `~` expanded, if that user exists."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def safely(look: Callable[[], bool]) -> bool:
    """Returns the result of a check such as ``file.exists``; False if it raises OSError (no permission, invalid
    name)."""
    try:
        return look()
    except OSError:
        return False


def siblings(file: Path) -> list[Path]:
    """Returns the entries of the file's folder; empty if it cannot be listed."""
    try:
        return list(file.parent.iterdir())
    except OSError:
        return []


def dotted(path: yamltext.Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"


def error_of(wrong: list[str]) -> ConfError:
    return ConfError(wrong[0] if len(wrong) == 1 else "\n  ".join([f"the conf has {len(wrong)} errors:", *wrong]))
