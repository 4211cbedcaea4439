"""Loads a conf file, or a shipped template by name, into a validated conf with absolute paths.

    conf = load_finetune("lora", ["train=tickets.jsonl", "training.epochs=2"])
    conf = load_serve("chat", ["model=support-bot", "models.support-bot.cpus=4"])

``--set NAME=VALUE`` sets the template's variable NAME if the template uses one of that name, otherwise the conf's
(dotted) key NAME. A variable comes from ``--set``, else from the last ``--vars`` file that has it, else from the
template's ``default(…)``. A key comes from ``--set``, else from the conf, else from the schema's default.

Relative paths are looked up beside the conf file, then in the current folder; data files finally under ``paths.data``.
Those of shipped templates and of ``--set`` are looked up only in the current folder.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import llm_ray
from llm_ray.conf import section, yamltext
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.keys import FINETUNE, SERVE, SWEEP, C, Keys
from llm_ray.conf.objectives import SECTIONS
from llm_ray.conf.render import RESERVED, Rendered, TemplateProblem, render, variables
from llm_ray.conf.section import Section
from llm_ray.conf.serve import ModelServing, ServeConf
from llm_ray.conf.sweep import SweepConf, with_values
from llm_ray.conf.validate import Setting, Validation, dotted, error_of, expand, safely, show, siblings
from llm_ray.datafiles import DATA_SUFFIXES, HUB_ID, is_task_path
from llm_ray.errors import ConfError
from llm_ray.nearest import nearest_names

ADAPTER_FILES = ("adapter_config.json",)
PACKAGE = Path(llm_ray.__file__).parent


def load_finetune(
    config: str | Path, overrides: Sequence[str] = (), vars_files: Sequence[str | Path] = (), home: Path | None = None
) -> FinetuneConf:
    """Returns a finetune's conf, rendered and validated, with absolute paths.

    `config` is a file or the name of a shipped template, `overrides` are ``key=value`` as after ``--set``, `vars_files`
    YAML files of template variables as after ``--vars``. Paths that the conf does not set are in `home` (default:
    LLM_RAY_HOME). Raises :class:`ConfError`.
    """
    return load(FINETUNE, FinetuneValidation, config, overrides, _variables(vars_files), home or section.home())


def load_serve(
    config: str | Path, overrides: Sequence[str] = (), vars_files: Sequence[str | Path] = (), home: Path | None = None
) -> ServeConf:
    """Returns the conf of an endpoint and its models; otherwise like :func:`load_finetune`."""
    return load(SERVE, ServeValidation, config, overrides, _variables(vars_files), home or section.home())


def load_sweep(
    config: str | Path, overrides: Sequence[str] = (), vars_files: Sequence[str | Path] = (), home: Path | None = None
) -> SweepConf:
    """Returns a sweep's conf, after checking its finetune's conf and the space of every searched key; otherwise like
    :func:`load_finetune`."""
    return load(SWEEP, SweepValidation, config, overrides, _variables(vars_files), home or section.home())


def finetune_of(conf: SweepConf, home: Path | None = None) -> FinetuneConf:
    """Returns the finetune's conf that a sweep's trials start from, with the keys they share. Raises
    :class:`ConfError`."""
    return load_finetune(conf.config, [f"{key}={json.dumps(value)}" for key, value in conf.set.items()], (), home)


def serve_options(given: Mapping[str, Any], overrides: Sequence[str], home: Path, source: str) -> ServeConf:
    """Returns the conf of an endpoint whose sections are `given` by command-line options instead of a file; otherwise
    like :func:`load_serve`.

    `source` names the options in errors. Raises :class:`ConfError`.
    """
    _, settings = _overrides(overrides, set(), None, SERVE)
    sections = {section: dict(keys) for section, keys in given.items()}
    document = yamltext.Document(sections, {("models", name): 0 for name in sections["models"]}, {})
    return ServeValidation(SERVE, Path(source), True, Rendered("", ()), document, settings, home).conf()


def load(
    keys: Keys[C],
    validation: Callable[..., Validation[C]],
    config: str | Path,
    overrides: Sequence[str],
    variables_given: Mapping[str, Any],
    home: Path,
) -> C:
    """Returns a conf of the kind of `keys`; `validation` resolves its files. Raises :class:`ConfError`."""
    file = find(config, keys.kind)
    template = _read(file)
    try:
        used = variables(template)
        given, settings = _overrides(overrides, used, file, keys)
        rendered = render(template, {**variables_given, **given})
    except TemplateProblem as problem:
        raise ConfError(f"{file}:{problem.line}: {problem.message}") from problem
    try:
        document = yamltext.parse(rendered.text)
    except yamltext.Problem as problem:
        raise ConfError(f"{file}:{rendered.origin(problem.line)}: {problem.message}") from problem
    if not isinstance(document.data, dict):
        found = "empty" if document.data is None else f"{show(document.data)}, not keys with values"
        needed = ", ".join(key.name for key in keys.needed())
        raise ConfError(f"{file}: the conf is {found}: it needs at least {needed}")
    return validation(keys, file, file in shipped(keys.kind).values(), rendered, document, settings, home).conf()


def dump(conf: Section) -> str:
    """Returns the conf as YAML with every key; :func:`load_finetune` or :func:`load_serve` loads an equal conf from it.

    Only the keys of the endpoint that were set are included, so that others keep the running endpoint's values. Raises
    :class:`ConfError` for text that contains `{% endraw %}`, which would end the raw block and make the rest a
    template.
    """
    values = conf.model_dump(mode="json")
    if isinstance(conf, ServeConf):
        values["endpoint"] = conf.endpoint.model_dump(mode="json", exclude_unset=True)
    text = yamltext.dump(values)
    if re.search(r"\{%[-+]?\s*endraw", text):
        raise ConfError("a value of the conf contains {% endraw %}, which a conf file cannot represent: rephrase it")
    return f"# {{% raw %}}\n{text}# {{% endraw %}}\n" if re.search(r"\{[{%#]", text) else text


def shipped(kind: str) -> dict[str, Path]:
    """Returns the shipped templates of a kind (``finetune``, ``serve``, ``sweep``) by name, from the source tree or the
    installed package."""
    folders = (PACKAGE.parent / "conf" / kind, PACKAGE / "shipped" / "conf" / kind)
    return {file.name.split(".")[0]: file for folder in folders for file in sorted(folder.glob("*.yaml.j2"))}


def find(config: str | Path, kind: str) -> Path:
    """Returns the conf file for `config`, a file or the name of a shipped template. Raises :class:`ConfError`."""
    file = expand(config)
    templates = shipped(kind)
    if safely(file.is_file):
        return file
    if str(config) in templates:
        return templates[str(config)]
    if safely(file.is_dir):
        raise ConfError(f"--config {config}: this is a folder; name a conf file in it")
    beside = {sibling.name: str(sibling) for sibling in siblings(file)}
    nearest = [beside.get(found, found) for found in nearest_names(file.name, [*templates, *beside])]
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise ConfError(
        f"--config {config}: no such file, and no shipped template of that name; {hint}Shipped: {', '.join(templates)}"
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfError(f"{file}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except OSError as error:
        raise ConfError(f"{file}: cannot be read: {error.strerror}") from error


def _variables(files: Iterable[str | Path]) -> dict[str, Any]:
    """Returns the template variables of the ``--vars`` files; later files take precedence."""
    values: dict[str, Any] = {}
    for name in files:
        file = expand(name)
        try:
            data = yamltext.parse(_read(file)).data
        except yamltext.Problem as problem:
            raise ConfError(f"{file}:{problem.line}: {problem.message}") from problem
        if not isinstance(data, dict) or any(not isinstance(key, str) or key in RESERVED for key in data):
            raise ConfError(
                f"--vars {file}: must contain names with values, except {' or '.join(RESERVED)}, which the template "
                "already has"
            )
        values |= data
    return values


def _overrides(
    overrides: Sequence[str], used: set[str], file: Path | None, keys: Keys[Any]
) -> tuple[dict[str, Any], list[Setting]]:
    """Splits ``--set`` overrides into template variables and settings of the conf's keys. `file` is the template, if
    there is one."""
    given: dict[str, Any] = {}
    settings: list[Setting] = []
    wrong = []
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        try:
            value = yamltext.value(text)
        except yamltext.Problem as problem:
            wrong.append(
                f"--set {override}: the value {problem.message}; quotes for YAML go inside the shell's: --set "
                f"'{name}=\"…\"'"
            )
            continue
        if not equals or not name:
            wrong.append(f"--set {override}: write it as key=value")
        elif name in used:
            given[name] = value
        elif paths := keys.paths(name, section=isinstance(value, dict)):
            settings.append(Setting(paths, value, f"--set {override}"))
        else:
            near = [*nearest_names(name, used), *filter(None, [keys.nearest_to(name)])]
            nearest = max(near, key=lambda one: SequenceMatcher(None, name, one).ratio(), default=None)
            names = (
                f"its variables are: {', '.join(sorted(used)) or 'none'}"
                if file
                else "a model's keys are models.NAME.KEY"
            )
            what = f"neither a key of the conf nor a variable of {file.name}" if file else "not a key of the conf"
            wrong.append(f"--set {override}: {name} is {what}; {f'did you mean {nearest}?' if nearest else names}")
    if wrong:
        raise error_of(wrong)
    return given, settings


class FinetuneValidation(Validation[FinetuneConf]):
    """Validation of a finetune whose files are on this machine or on shared storage."""

    def resolve(self, conf: FinetuneConf) -> FinetuneConf:
        def files(section: str, key: str, names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(self.data_file((section, key, i), name, conf.paths.data) for i, name in enumerate(names))

        data: dict[str, Any] = {
            "train": files("data", "train", conf.data.train),
            "processor": self.processor(conf.data.processor),
        }
        if isinstance(conf.data.validation, tuple):
            data["validation"] = files("data", "validation", conf.data.validation)
        evaluation = {
            "data": conf.evaluation.data and files("evaluation", "data", conf.evaluation.data),
            "tasks": tuple(
                self.task(("evaluation", "tasks", i), name, conf.paths.data)
                for i, name in enumerate(conf.evaluation.tasks)
            ),
        }
        model: dict[str, Any] = {"base": self.folder(("model", "base"), conf.model.base)}
        if conf.model.tokenizer:
            model["tokenizer"] = self.folder(("model", "tokenizer"), conf.model.tokenizer)
        if conf.model.trust_remote_code:
            model["trusted_models"] = tuple(dict.fromkeys([*conf.model.trusted_models, model["base"]]))
        self.must_be_file(("model", "chat_template"), conf.model.chat_template)
        return conf.model_copy(
            update={
                "data": conf.data.model_copy(update=data),
                "evaluation": conf.evaluation.model_copy(update=evaluation),
                "model": conf.model.model_copy(update=model),
            }
        )

    def data_file(self, path: yamltext.Path, name: str, data: Path) -> str:
        """Returns the absolute path of an entry in a list of data files; hub ids are unchanged."""
        if not name.strip():
            self.complain(path, f"{dotted(path)} is empty: name a file, a folder or a hub data set")
            return name
        entry = expand(name)
        candidates = list(dict.fromkeys([*self.candidates(path, name), data / entry]))
        if found := next((candidate for candidate in candidates if safely(candidate.exists)), None):
            return str(found)
        hub = HUB_ID.fullmatch(name) and entry.suffix.lower() not in DATA_SUFFIXES
        if hub and not any(safely(candidate.parent.is_dir) for candidate in candidates):
            return name
        nearest = [
            c.with_name(found) for c in candidates for found in nearest_names(c.name, (one.name for one in siblings(c)))
        ]
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        if not hint and not entry.is_absolute() and entry.suffix.lower() not in DATA_SUFFIXES:
            hint = "; hub data sets are named organisation/name"
        self.complain(path, f"{dotted(path[:-1])}: no such file or folder: {' or '.join(map(str, candidates))}{hint}")
        return name

    def task(self, path: yamltext.Path, name: str, data: Path) -> str:
        """Returns the absolute path of a local task of the evaluation harness; names of its own tasks are unchanged."""
        if not name.strip():
            self.complain(path, f"{dotted(path)} is empty: name a task of lm-eval, a task file or a folder of them")
        if not is_task_path(name):
            return name
        candidates = list(dict.fromkeys([*self.candidates(path, name), data / expand(name)]))
        if found := next((candidate for candidate in candidates if safely(candidate.exists)), None):
            return str(found)
        nearest = [
            c.with_name(found) for c in candidates for found in nearest_names(c.name, (one.name for one in siblings(c)))
        ]
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        self.complain(
            path, f"{dotted(path[:-1])}: no such task file or folder: {' or '.join(map(str, candidates))}{hint}"
        )
        return name

    def processor(self, name: str | None) -> str | None:
        """Returns a processor with the absolute path of its file; others are unchanged."""
        file, _, attribute = (name or "").rpartition(":")
        path = ("data", "processor")
        if (name or "").endswith(".py"):
            self.complain(path, f"data.processor is {name}: add the class, as in {name}:MyProcessor")
        if not file.endswith(".py"):
            return name
        candidates = self.candidates(path, file)
        found = next((candidate for candidate in candidates if safely(candidate.is_file)), None)
        if not found:
            self.complain(path, f"data.processor: no such file: {' or '.join(map(str, candidates))}")
        return f"{found}:{attribute}"


class ServeValidation(Validation[ServeConf]):
    """Validation of an endpoint whose files are on this machine or on shared storage."""

    def resolve(self, conf: ServeConf) -> ServeConf:
        self.must_be_file(("endpoint", "tls_certificate"), conf.endpoint.tls_certificate)
        self.must_be_file(("endpoint", "tls_key"), conf.endpoint.tls_key)
        return conf.model_copy(
            update={"models": {name: self._model(name, model) for name, model in conf.models.items()}}
        )

    def _model(self, name: str, model: ModelServing) -> ModelServing:
        path = ("models", name)
        self.must_be_file((*path, "chat_template"), model.chat_template)
        update: dict[str, Any] = {
            "model": self.folder((*path, "model"), model.model),
            "adapters": {
                key: self.folder((*path, "adapters", key), adapter, ADAPTER_FILES)
                for key, adapter in model.adapters.items()
            },
        }
        if model.tokenizer:
            update["tokenizer"] = self.folder((*path, "tokenizer"), model.tokenizer)
        if model.trust_remote_code:
            update["trusted_models"] = tuple(dict.fromkeys([*model.trusted_models, update["model"]]))
        return model.model_copy(update=update)


MOST_COMBINATIONS = 256
"""Combinations of the spaces' ends to check in full; beyond that, only all first and all last ends are combined."""
SPLITTING = ("tuning.objective", "training.seed")
"""Keys that determine how the data are read, and which rows are held out for validation."""


class SweepValidation(Validation[SweepConf]):
    """Validation of a sweep: its finetune's conf, and every searched key against that."""

    def _at_home(self) -> dict[str, Any]:
        return self.data  # the finetune has its folders

    def resolve(self, conf: SweepConf) -> SweepConf:
        found = next((file for file in self.candidates(("config",), conf.config) if safely(file.is_file)), None)
        conf = conf.model_copy(update={"config": str(found or conf.config)})
        try:
            base = finetune_of(conf, self.home)
        except ConfError as error:
            of_set = next((key for key in conf.set if f"--set {key}=" in str(error)), None)
            message = str(error) if of_set is None else _without_settings(error, conf.set)
            self.complain(("config",) if of_set is None else ("set", of_set), message)
            return conf
        self._check_base(conf, base)
        for key in conf.search:
            if why := _not_searchable(key, conf, base):
                self.complain(("search", key), f"search.{key}: {why}")
        if not self.wrong:
            self._check_values(conf, base)
        return conf

    def _check_base(self, conf: SweepConf, base: FinetuneConf) -> None:
        if base.data.validation is None:
            self.complain(
                ("set",),
                f"{conf.config}: data.validation is null, but trials are compared on validation rows: set it to a fraction, "
                "as in set: {data.validation: 0.1}",
            )
        if conf.metric == "accuracy" and not base.objective.compares:
            self.complain(
                ("metric",),
                "metric accuracy needs an objective that learns from pairs or rated answers, but tuning.objective is "
                f"{base.tuning.objective}: "
                "use metric loss",
            )

    def _check_values(self, conf: SweepConf, base: FinetuneConf) -> None:
        """Checks every end of each space by itself, with the finetune's messages; then combinations."""
        for key, space in conf.search.items():
            for value in space.ends:
                try:
                    finetune_of(conf.model_copy(update={"set": conf.set | {key: value}}), self.home)
                except ConfError as error:
                    self.complain(("search", key), f"search.{key}: {_without_settings(error, conf.set | {key: value})}")
                    break
        if self.wrong:
            return
        ends = [space.ends for space in conf.search.values()]
        if math.prod(map(len, ends)) <= MOST_COMBINATIONS:
            combinations = list(itertools.product(*ends))
        else:
            combinations = [tuple(of_key[0] for of_key in ends), tuple(of_key[-1] for of_key in ends)]
        plain = base.model_dump(mode="json")
        for combination in combinations:
            values = dict(zip(conf.search, combination, strict=True))
            try:
                FinetuneConf.model_validate(with_values(values, plain))
            except ValidationError as error:
                together = ", ".join(f"{key} {show(value)}" for key, value in values.items())
                why = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                self.complain(("search",), f"search: {together} cannot be combined: {why}")
                return


def _without_settings(error: ConfError, settings: Mapping[str, Any]) -> str:
    """Returns an error's message without its mention of ``--set`` for these settings."""
    text = str(error)
    for key, value in settings.items():
        text = text.replace(f"--set {key}={json.dumps(value)}: ", "")
    return text


def _not_searchable(key: str, conf: SweepConf, base: FinetuneConf) -> str:
    """Returns why a key cannot be searched; empty if it can."""
    found = FINETUNE.key(tuple(key.split(".")))
    if found is None:
        nearest = FINETUNE.nearest_to(key)
        return f"no such key of a finetune{f'; did you mean {nearest}?' if nearest else ''}"
    if found.section:
        return (
            f"a section of a finetune's conf, not a key: name one of {', '.join(k.name for k in FINETUNE.below(key))}"
        )
    if not key.startswith(("tuning.", "training.")) or key in SPLITTING:
        return (
            "trials share their data and model, so that their losses can be compared: search keys of tuning and training "
            f"(without {' and '.join(SPLITTING)}), and make a sweep for each value of this one"
        )
    if key in conf.set:
        return "set has a value for it too: keep one of them"
    of_objective = base.objective.section and key.startswith(f"tuning.{base.objective.section}.")
    if of_objective and conf.metric == "loss":
        return "it changes what the loss means, so that losses cannot be compared: use metric: accuracy"
    if key.startswith(SECTIONS) and not of_objective:
        return f"it has no effect: tuning.objective is {base.tuning.objective}"
    methods = conf.search["tuning.method"].ends if "tuning.method" in conf.search else [base.tuning.method]
    if key.startswith("tuning.lora.") and "lora" not in methods:
        return f"it has no effect: tuning.method is {base.tuning.method}"
    return ""
