"""From a conf file (or a shipped template's name) to a validated conf with absolute paths.

    conf = load_finetune("lora", ["train=tickets.jsonl", "training.epochs=2"])

``--set NAME=VALUE`` gives the template's variable NAME where the template uses one of that name, and else sets the conf's
key NAME (dotted), over whatever the conf says. A variable is taken from ``--set``, else from the last ``--vars`` file that
has it, else the template's ``default(…)`` holds. A key is taken from ``--set``, else from the conf, else the schema's default holds.

Relative paths are looked up beside the conf file, then in the current folder; data files last under ``paths.data``. For a
shipped template and for ``--set`` the current folder alone is "beside".

Everything wrong with a conf is told in one :class:`~llm_ray.errors.ConfError`, each with file, line, key and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

import llm_ray
from llm_ray.conf import keys, yamltext
from llm_ray.conf.render import RESERVED, Rendered, TemplateProblem, render, undefined, variables, without_marks
from llm_ray.conf.schema import FinetuneConf
from llm_ray.errors import ConfError

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
DOTTED = re.compile(r"[a-z_]+(?:\.[a-z_]+)+|\bstages\b")
PACKAGE = Path(llm_ray.__file__).parent


def load_finetune(config: str | Path, overrides: Sequence[str] = (), vars_files: Sequence[str | Path] = ()) -> FinetuneConf:
    """The conf of a finetune, rendered, validated, its paths absolute.

    `config` is a file or the name of a shipped template, `overrides` are ``key=value`` as after ``--set``, `vars_files`
    YAML files of template variables as after ``--vars``. Raises :class:`ConfError`.
    """
    file = find(config, "finetune")
    template = _read(file)
    try:
        used = variables(template)
        given, settings = _overrides(overrides, used, file)
        rendered = render(template, _variables(vars_files) | given)
    except TemplateProblem as problem:
        raise ConfError(f"{file}:{problem.line}: {problem.message}") from problem
    try:
        document = yamltext.parse(rendered.text)
    except yamltext.Problem as problem:
        raise ConfError(f"{file}:{rendered.origin(problem.line)}: {problem.message}") from problem
    if not isinstance(document.data, dict):
        found = "empty" if document.data is None else f"{_show(document.data)}, no keys with values"
        raise ConfError(f"{file}: the conf is {found}: it needs at least name, model.base and data.train")
    return _Loading(file, rendered, document, settings).conf()


def dump(conf: FinetuneConf) -> str:
    """The conf as YAML, every key written out; :func:`load_finetune` makes an equal conf of it."""
    text = yamltext.dump(conf.model_dump(mode="json"))
    return f"# {{% raw %}}\n{text}# {{% endraw %}}\n" if re.search(r"\{[{%#]", text) else text


def shipped(kind: str) -> dict[str, Path]:
    """The shipped templates of a kind (``finetune``) by name, from the source tree or the installed package."""
    folders = (PACKAGE.parent / "conf" / kind, PACKAGE / "shipped" / "conf" / kind)
    return {file.name.split(".")[0]: file for folder in folders for file in sorted(folder.glob("*.yaml.j2"))}


def find(config: str | Path, kind: str) -> Path:
    """The conf file that `config` means: a file, or the name of a shipped template. Raises :class:`ConfError`."""
    file = _expand(config)
    templates = shipped(kind)
    if _there(file.is_file):
        return file
    if str(config) in templates:
        return templates[str(config)]
    if _there(file.is_dir):
        raise ConfError(f"--config {config}: this is a folder; name a conf file in it")
    beside = [str(sibling) for sibling in _siblings(file)]
    nearest = get_close_matches(str(config), [*templates, *beside], 1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise ConfError(f"--config {config}: no such file, and no shipped template of that name; {hint}Shipped: {', '.join(templates)}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfError(f"{file}: byte {error.start} is not UTF-8: save the file in that encoding") from error
    except OSError as error:
        raise ConfError(f"{file}: cannot be read: {error.strerror}") from error


def _variables(files: Iterable[str | Path]) -> dict[str, Any]:
    """The template variables of the ``--vars`` files, later ones over earlier ones."""
    values: dict[str, Any] = {}
    for name in files:
        file = _expand(name)
        try:
            data = yamltext.parse(_read(file)).data
        except yamltext.Problem as problem:
            raise ConfError(f"{file}:{problem.line}: {problem.message}") from problem
        if not isinstance(data, dict) or any(not isinstance(key, str) or key in RESERVED for key in data):
            raise ConfError(
                f"--vars {file}: must hold names with values, and no name {' or '.join(RESERVED)}, which the template has already"
            )
        values |= data
    return values


@dataclass(frozen=True)
class _Setting:
    """A key of the conf given with ``--set``."""

    path: yamltext.Path
    value: Any
    text: str


def _overrides(overrides: Sequence[str], used: set[str], file: Path) -> tuple[dict[str, Any], list[_Setting]]:
    """Template variables, and settings of the conf's keys, as given with ``--set``."""
    given: dict[str, Any] = {}
    settings: list[_Setting] = []
    wrong = []
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        try:
            value = yamltext.value(text)
        except yamltext.Problem as problem:
            wrong.append(f"--set {override}: the value {problem.message}; quotes for YAML go inside the shell's: --set '{name}=\"…\"'")
            continue
        if not equals or not name:
            wrong.append(f"--set {override}: write it as key=value, as in --set training.epochs=2")
        elif name in used:
            given[name] = value
        elif keys.known(name):
            settings.append(_Setting(tuple(name.split(".")), value, f"--set {override}"))
        else:
            nearest = next(iter(get_close_matches(name, used, 1)), None) or keys.nearest(name)
            hint = f"did you mean {nearest}?" if nearest else f"its variables are: {', '.join(sorted(used)) or 'none'}"
            wrong.append(f"--set {override}: {name} is neither a key of the conf nor a variable of {file.name}; {hint}")
    if wrong:
        raise _error(wrong)
    return given, settings


class _Loading:
    """One conf on its way from YAML to schema, with what is known of where each key came from, and what is wrong with it."""

    def __init__(self, file: Path, rendered: Rendered, document: yamltext.Document, settings: list[_Setting]) -> None:
        self.file = file
        self.rendered = rendered
        self.document = document
        self.settings = settings
        self.data: dict[str, Any] = document.data
        self.here = Path.cwd()
        self.beside = self.here if file in shipped("finetune").values() else file.absolute().parent
        self.wrong: list[tuple[int, str]] = []  # line (0: not in the file) and message
        self.unset: tuple[yamltext.Path, ...] = ()  # keys with undefined variables

    def conf(self) -> FinetuneConf:
        for setting in self.settings:
            self._set(setting)
        unset = dict(_undefined(self.data, ()))
        for path, messages in unset.items():
            self._complain(path, f"{without_marks(_dotted(path))}: {'; '.join(messages)}")
        self.unset = tuple(unset)
        self._absolute()
        try:
            conf = FinetuneConf.model_validate(self.data)
        except ValidationError as error:
            details: dict[yamltext.Path, ErrorDetails] = {}
            for detail in error.errors(include_url=False):
                details.setdefault(self._path(detail), detail)
            for path, detail in details.items():
                self._explain(path, detail)
        else:
            conf = self._resolve(conf)
        if self.wrong:
            raise _error([message for _, message in sorted(self.wrong, key=lambda entry: entry[0])])
        return conf

    # Places ------------------------------------------------------------------------------------------------------------

    def _setting(self, path: yamltext.Path) -> _Setting | None:
        """The ``--set`` that `path` came from."""
        return next((s for s in reversed(self.settings) if path[: len(s.path)] == s.path), None)

    def _complain(self, path: yamltext.Path, message: str) -> None:
        """Notes the message, with the place of `path` before it; not of values that are only undefined variables' marks."""
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
        """The place in the data that a validation error is about: pydantic's without the names of a union's alternatives."""
        path: list[str | int] = []
        node: Any = self.data
        for part in detail["loc"]:
            inside = part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int) and part < len(node)
            if inside:
                node = node[part]
            elif not (detail["type"] == "missing" and part == detail["loc"][-1]):
                continue
            path.append(part)
        return tuple(path)

    # What --set and relative paths change --------------------------------------------------------------------------------

    def _set(self, setting: _Setting) -> None:
        node = self.data
        for part in setting.path[:-1]:
            if node.get(str(part)) is None:
                node[str(part)] = {}
            node = node[str(part)]
            if not isinstance(node, dict):
                return  # the schema's error says what is wrong with it
        node[str(setting.path[-1])] = setting.value

    def _folders(self, path: yamltext.Path) -> list[Path]:
        """Where a relative path of the key `path` is looked up."""
        return [self.here] if self._setting(path) else list(dict.fromkeys([self.beside, self.here]))

    def _absolute(self) -> None:
        """Folders and the chat template are made absolute before the schema would take them from the current folder."""
        for section, names in (("paths", ("models", "data", "runs")), ("model", ("chat_template",))):
            values = self.data.get(section)
            for name in names:
                if isinstance(values, dict) and isinstance(values.get(name), str):
                    path = _expand(values[name])
                    folders = self._folders((section, name))
                    values[name] = str(next((f / path for f in folders if _there((f / path).exists)), folders[0] / path))

    def _resolve(self, conf: FinetuneConf) -> FinetuneConf:
        """The conf with the files it names as absolute paths; complains of what is not there."""

        def files(section: str, key: str, names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(self._data_file((section, key, i), name, conf.paths.data) for i, name in enumerate(names))

        data: dict[str, Any] = {"train": files("data", "train", conf.data.train), "processor": self._processor(conf.data.processor)}
        if isinstance(conf.data.validation, tuple):
            data["validation"] = files("data", "validation", conf.data.validation)
        evaluation = {"data": conf.evaluation.data and files("evaluation", "data", conf.evaluation.data)}
        model: dict[str, Any] = {"base": self._model("base", conf.model.base)}
        if conf.model.tokenizer:
            model["tokenizer"] = self._model("tokenizer", conf.model.tokenizer)
        if conf.model.trust_remote_code:
            model["trusted_models"] = tuple(dict.fromkeys([*conf.model.trusted_models, model["base"]]))
        if conf.model.chat_template and not _there(conf.model.chat_template.is_file):
            self._complain(("model", "chat_template"), f"model.chat_template: no such file: {conf.model.chat_template}")
        return conf.model_copy(
            update={
                "data": conf.data.model_copy(update=data),
                "evaluation": conf.evaluation.model_copy(update=evaluation),
                "model": conf.model.model_copy(update=model),
            }
        )

    def _data_file(self, path: yamltext.Path, name: str, data: Path) -> str:
        """An entry of a list of data files: absolute, or a hub id as it is."""
        if not name.strip():
            self._complain(path, f"{_dotted(path)} is empty: name a file, a folder or a data set of the hub")
            return name
        entry = _expand(name)
        candidates = list(dict.fromkeys(folder / entry for folder in [*self._folders(path), data]))
        if found := next((candidate for candidate in candidates if _there(candidate.exists)), None):
            return str(found)
        hub = HUB_ID.fullmatch(name) and entry.suffix.lower() not in DATA_SUFFIXES
        if hub and not any(_there(candidate.parent.is_dir) for candidate in candidates):
            return name
        siblings = [str(sibling) for candidate in candidates for sibling in _siblings(candidate)]
        nearest = [n for candidate in candidates for n in get_close_matches(str(candidate), siblings, 1, 0.9)]
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        if not hint and not entry.is_absolute() and entry.suffix.lower() not in DATA_SUFFIXES:
            hint = "; a data set of the hub would be named organisation/name"
        self._complain(path, f"{_dotted(path[:-1])}: no such file or folder: {' or '.join(map(str, candidates))}{hint}")
        return name

    def _model(self, key: str, name: str) -> str:
        """A model's folder as absolute path; a name of the registry, of a run or of the hub as it is."""
        path = _expand(name)
        explicit = path.is_absolute() or name.startswith(("./", "../"))
        candidates = [folder / path for folder in self._folders(("model", key))]
        for folder in candidates:
            # A folder that only happens to be called like a model of the registry is none.
            if _there(folder.is_dir) and (explicit or any(_there((folder / file).exists) for file in MODEL_FILES)):
                return str(folder)
        if explicit:
            where = " or ".join(map(str, dict.fromkeys(candidates)))
            self._complain(("model", key), f"model.{key}: no such folder: {where}")
        return name

    def _processor(self, name: str | None) -> str | None:
        """A processor in a file of the user's own with the file's absolute path; others as they are."""
        file, _, attribute = (name or "").rpartition(":")
        path = ("data", "processor")
        if (name or "").endswith(".py"):
            self._complain(path, f"data.processor is {name}: name the class too, as in {name}:MyProcessor")
        if not file.endswith(".py"):
            return name
        candidates = [folder / _expand(file) for folder in self._folders(path)]
        found = next((candidate for candidate in candidates if _there(candidate.is_file)), None)
        if not found:
            where = " or ".join(map(str, dict.fromkeys(candidates)))
            self._complain(path, f"data.processor: no such file: {where}")
        return f"{found}:{attribute}"

    # Words -------------------------------------------------------------------------------------------------------------

    def _explain(self, path: yamltext.Path, detail: ErrorDetails) -> None:
        """Complains of a validation error in the user's words."""
        name, value, kind = _dotted(path), detail["input"], detail["type"]
        if kind == "missing":
            for key in keys.table().values():
                if not key.section and (key.name == name or (key.name.startswith(f"{name}.") and key.required)):
                    self._complain(path, f"{key.name} is missing: {keys.first_sentence(key.text)} Add it, or give --set {key.name}=…")
        elif kind in ("extra_forbidden", "invalid_key"):
            section = name.rpartition(".")[0]
            here = [key.name.rpartition(".")[2] for key in keys.table().values() if key.name.rpartition(".")[0] == section]
            nearest = keys.nearest(name)
            hint = f"did you mean {nearest}?" if nearest else f"{section or 'a conf'} has the keys {', '.join(here)}"
            self._complain(path, f"{name}: there is no such key; {hint}")
        elif kind == "value_error":
            for text in str(detail["ctx"]["error"]).split("\n"):
                self._complain(self._about(text) or path, text)
        elif kind in ("string_pattern_mismatch", "string_too_short", "too_short"):
            self._complain(path, f"{name} is {_show(value) if value else 'empty'}, which is not allowed. {keys.table()[name].text}")
        else:
            node = _schema(path)
            must = keys.describe(node)
            hint = ""
            if must.startswith(("a section", "keys with values")):
                must = f"a section, with keys indented below {name}:"
                if isinstance(value, str) and re.match(r"\w+:\S", value):
                    hint = f" ({value.partition(':')[0]}: wants a blank after the colon)"
            elif must.startswith("text") and isinstance(value, (bool, int, float)):
                hint = f": put it in quotes: '{self.document.written.get(path, value)}'"
            elif close := get_close_matches(str(value).lower(), keys.choices(node), 1):
                hint = f"; did you mean {close[0]}?"
            self._complain(path, f"{name} is {_show(value)}: it must be {must}{hint}")

    def _about(self, message: str) -> yamltext.Path | None:
        """The first key named in a rule's message that the user has given."""
        paths = [tuple(name.split(".")) for name in DOTTED.findall(message)]
        return next((path for path in paths if path in self.document.lines or self._setting(path)), None)


def _undefined(node: Any, path: yamltext.Path) -> Iterator[tuple[yamltext.Path, list[str]]]:
    """Where the keys and values of `node` hold undefined variables, and what is to be said of them."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _undefined(str(key), (*path, key))
            yield from _undefined(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _undefined(value, (*path, i))
    elif isinstance(node, str) and (messages := undefined(node)):
        yield path, messages


def _expand(name: str | Path) -> Path:
    """The path with `~` expanded, where there is such a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _there(look: Callable[[], bool]) -> bool:
    """Whether the file is there; no as well where it may not be looked for, or no file can be called so."""
    try:
        return look()
    except OSError:
        return False


def _siblings(file: Path) -> list[Path]:
    """What lies in the same folder, if that can be listed."""
    try:
        return list(file.parent.iterdir())
    except OSError:
        return []


def _schema(path: yamltext.Path) -> dict[str, Any]:
    """The JSON Schema of the value at `path`."""
    names = [_dotted(path[:i]) for i in range(len(path), 0, -1)]
    name, key = next((name, key) for name in names if (key := keys.table().get(name)))
    node = key.schema
    for option in [node, *node.get("anyOf", ())]:
        inner = option.get("additionalProperties") or option.get("items")
        if inner and name != _dotted(path):
            return inner if isinstance(inner, dict) else {}
    return node


def _dotted(path: yamltext.Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"


def _error(wrong: list[str]) -> ConfError:
    return ConfError(wrong[0] if len(wrong) == 1 else "\n  ".join([f"{len(wrong)} things are wrong with the conf:", *wrong]))
