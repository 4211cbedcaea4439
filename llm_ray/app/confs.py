"""Converts a form's settings to a finetune conf and back; the form's fields come from the conf's schema.

settings = {"train": "tickets.jsonl", "model": "smollm2-135m-instruct", "name": "support-bot", "training.epochs": "2"}
conf = conf_of(settings, home)
print(dump(conf), command_of(settings))
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.app.finetune import texts
from llm_ray.conf import yamltext
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.keys import FINETUNE, Key, Keys, choices, describe
from llm_ray.conf.load import dump, load_finetune
from llm_ray.conf.section import Paths
from llm_ray.data.processors import SHIPPED
from llm_ray.datafiles import is_task_path
from llm_ray.errors import ConfError

__all__ = ["ASKED", "Field", "beyond", "command_of", "conf_of", "dump", "fields", "settings_of"]

_ABSENT: Any = object()
TEMPLATE = "lora"
"""The shipped template that the settings are applied to."""
ASKED = {"data.train": "train", "model.base": "model", "name": "name"}
"""Required keys, mapped to the template's variables."""


@dataclass(frozen=True)
class Field:
    """A conf key as a form field. Values are YAML, as for --set; an empty value means the default."""

    name: str
    section: str
    text: str
    kind: str
    """The accepted type of value, in words."""
    default: str
    choices: tuple[str, ...]
    """All accepted values; empty if the values cannot be listed."""


def fields(keys: Keys[Any] = FINETUNE) -> list[Field]:
    """Returns a field for each key not in `ASKED`, in schema order, with the template's defaults."""
    template = load_finetune(TEMPLATE, ["train=organisation/name"]).model_dump(mode="json")
    return [
        Field(key.name, key.above, key.text, describe(key.schema), _default(key, template), _only(key))
        for key in keys.table.values()
        if key.name not in ASKED and not (key.section and "anyOf" not in key.schema)
    ]


def conf_of(settings: Mapping[str, str], home: Path) -> FinetuneConf:
    """Returns the conf for these settings: keys (or template variables) with YAML values. Empty values are skipped.
    Raises ConfError."""
    return load_finetune(TEMPLATE, _overrides(settings), home=home)


def command_of(settings: Mapping[str, str]) -> str:
    """Returns the equivalent command line."""
    return shlex.join(
        [
            "llm-ray",
            "finetune",
            "--config",
            TEMPLATE,
            *(part for one in _overrides(settings) for part in ("--set", one)),
        ]
    )


def settings_of(text: str) -> dict[str, str]:
    """Returns the settings that reproduce a YAML conf, without defaults and without `paths`, which is specific to this
    machine.

    Raises ConfError.
    """
    if re.search(r"\{[{%]", text) and not text.startswith("# {% raw %}"):  # written by `dump` for literal braces
        raise ConfError(
            "the file is a template: upload the rendered conf (llm-ray finetune --config FILE --dry-run shows it)"
        )
    try:
        data = yamltext.parse(text).data
    except yamltext.Problem as problem:
        raise ConfError(f"line {problem.line}: {problem.message}") from problem
    if not isinstance(data, dict):
        raise ConfError("the file has no keys with values: upload a conf as shown or downloaded here")
    _check_known(data, ())
    defaults = {field.name: field.default for field in fields()}
    found = {}
    for key in FINETUNE.table.values():
        value = _at(data, key.name)
        if value is _ABSENT or (key.section and isinstance(value, dict)) or key.name.startswith("paths."):
            continue
        written = _written(value)
        empty = not defaults.get(key.name) and value in (None, [], {})
        if written != defaults.get(key.name) and not empty:
            found[ASKED.get(key.name, key.name)] = written
    return found


def beyond(conf: FinetuneConf, readable: Sequence[Path], paths: Paths) -> list[str]:
    """Returns what a conf uses beyond the files in `readable`, the folders `paths` and built-in code, one message each.
    Only admins may run a conf with such uses."""
    folders = [folder.resolve() for folder in readable]

    def foreign(text: str) -> bool:
        path = Path(text).expanduser()
        return (path.is_absolute() or path.exists()) and not any(
            path.resolve().is_relative_to(folder) for folder in folders
        )

    validation = conf.data.validation if isinstance(conf.data.validation, tuple) else ()
    files = [*conf.data.train, *validation, *(conf.evaluation.data or ()), conf.model.base, conf.model.tokenizer or ""]
    files += [conf.model.gguf_file or "", str(conf.model.chat_template or ""), *texts(conf.data.processor_args)]
    wrong = [f"{file} is not one of your files" for file in files if file and foreign(file)]
    if conf.paths != paths:
        wrong.append("paths: this machine's folders cannot be changed here")
    if conf.model.trust_remote_code:
        wrong.append("model.trust_remote_code runs code that comes with the model")
    wrong += [
        f"evaluation.tasks: {task} is a task file, which can run code"
        for task in conf.evaluation.tasks
        if is_task_path(task)
    ]
    if conf.data.processor and conf.data.processor not in SHIPPED:
        wrong.append(f"data.processor runs code that is not built in; built in are {', '.join(SHIPPED)}")
    return wrong


def _overrides(settings: Mapping[str, str]) -> list[str]:
    return [f"{name}={value.strip()}" for name, value in settings.items() if value.strip()]


def _check_known(data: Mapping[str, Any], above: tuple[str, ...]) -> None:
    for name, value in data.items():
        path = (*above, str(name))
        if not FINETUNE.known(path):
            nearest = FINETUNE.nearest(path)
            raise ConfError(
                f"{'.'.join(path)} is not a key of a conf" + (f"; did you mean {nearest}?" if nearest else "")
            )
        if isinstance(value, dict):
            _check_known(value, path)


def _at(data: Any, name: str) -> Any:
    for part in name.split("."):
        data = data.get(part, _ABSENT) if isinstance(data, dict) else _ABSENT
    return data


def _written(value: Any) -> str:
    """Formats a value as one line of YAML."""
    if isinstance(value, str):
        try:
            plain = value.strip() == value and bool(value) and yamltext.value(value) == value
        except yamltext.Problem:
            plain = False
        return value if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def _default(key: Key, template: Mapping[str, Any]) -> str:
    value = _at(template, key.name)
    if value in (None, _ABSENT):
        value = key.schema.get("default")
    return "" if value in (None, [], {}) or key.name.startswith("paths.") else _written(value)


def _only(key: Key) -> tuple[str, ...]:
    options = [key.schema, *key.schema.get("anyOf", ())]
    if key.schema.get("type") == "boolean":
        return ("true", "false")
    words = choices(key.schema)
    closed = all(
        "enum" in option or "const" in option or option.get("type") == "null"
        for option in options
        if "anyOf" not in option
    )
    return tuple(words) if words and closed else ()
