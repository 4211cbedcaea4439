"""Runs lm-eval (EleutherAI's Language Model Evaluation Harness) on one model.

lm-eval is installed with `make setup-lm-eval` into a folder of its own, with the packages that it adds: it computes
with this environment's torch and transformers, which stay as they are locked. A process that has loaded it should do
nothing else: it imports tasks' functions, and changes the current folder.

The figures are those of the harness's own command on the same model (`llm_ray` adds nothing to them):

    PYTHONPATH=.venv/lm-eval .venv/bin/python -m lm_eval run --model hf --device cpu \\
        --model_args pretrained=runs/support-bot/output,dtype=float32 --tasks arc_easy --batch_size 8
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tqdm import tqdm

from llm_ray.conf.finetune import Evaluation
from llm_ray.conf.section import harness_folder
from llm_ray.datafiles import TASK_SUFFIXES, is_task_path
from llm_ray.errors import ConfError, DataError, LlmRayError
from llm_ray.nearest import nearest_names
from llm_ray.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Told = Callable[[int, int, str], None]
"""Receives progress: requests computed, of how many, and of what kind."""


class Figure(TypedDict):
    """One metric of one task, as lm-eval computes it. `filter` is how answers were extracted from the text ("none" if
    not), `stderr` the standard error of `value` (None if unknown), `rows` and `fewshot` the numbers of rows and of
    examples in each prompt, `group` the group that the task was run as a part of ("" if none), `version` the task's."""

    task: str
    group: str
    metric: str
    filter: str
    higher_is_better: bool | None
    value: float
    stderr: float | None
    rows: int | None
    fewshot: int | None
    version: str


class _Said(logging.Handler):
    """Keeps the last error that lm-eval has logged: some of its exceptions do not say what is wrong."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


_SAID = _Said(logging.ERROR)


def check_installed() -> tuple[Path, str]:
    """Returns the folder of lm-eval, and its version. Raises ConfError, with the command that installs it, if there is
    none."""
    folder = harness_folder(os.environ)
    for found in importlib.metadata.distributions(name="lm_eval", path=[str(folder)]):
        return folder, found.version
    raise ConfError(
        f"evaluation.tasks needs lm-eval, which {folder} does not contain: install it with `make setup-lm-eval` (on a "
        "cluster: llm_ray_lm_eval: true and site.yml), or install requirements/lm-eval.txt into a folder with pip "
        "install --no-deps --target and set LLM_RAY_LM_EVAL_ENV to it; or remove evaluation.tasks"
    )


def check_tasks(evaluation: Evaluation, reporter: Reporter) -> list[str]:
    """Loads every task of `evaluation.tasks` with its data, and makes its first prompt. Returns a line for each entry.
    Call it in a process of its own.

    Raises ConfError or DataError that names the entry, for an unknown name, a broken task file, data that cannot be
    had, two tasks of the same name, or a task that cannot be run here.
    """
    _load_harness()
    seen: dict[str, str] = {}
    lines = []
    with reporter.bar("loading tasks", len(evaluation.tasks)) as bar:
        for number, entry in enumerate(evaluation.tasks):
            bar.update(number, len(evaluation.tasks), Path(entry).name)
            tasks = _checked(entry, evaluation)
            for name in tasks:
                if name in seen:
                    raise ConfError(
                        f"evaluation.tasks: {entry} and {seen[name]} both contain the task {name}: remove one of them, "
                        "or rename the task"
                    )
                seen[name] = entry
            rows = sum(min(task_rows, evaluation.task_limit or task_rows) for task_rows in tasks.values())
            what = "" if [*tasks] == [entry] else f" ({', '.join(tasks) if len(tasks) < 5 else f'{len(tasks)} tasks'})"
            lines.append(f"{entry}{what}: {rows} rows")
        bar.update(len(evaluation.tasks), len(evaluation.tasks))
    return lines


def run_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, entry: str, evaluation: Evaluation, told: Told
) -> list[Figure]:
    """Returns the figures of an entry of `evaluation.tasks`. Raises DataError if lm-eval fails."""
    _load_harness()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models import huggingface

    with _within(entry), _explained(entry), _progress(huggingface, told):
        names, manager = _names(entry)
        found = simple_evaluate(
            model=huggingface.HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=evaluation.batch_size, backend="causal"
            ),
            tasks=names,
            task_manager=manager,
            num_fewshot=evaluation.task_fewshot,
            limit=evaluation.task_limit,
            apply_chat_template=evaluation.task_chat_template,
            fewshot_as_multiturn=evaluation.task_chat_template,  # as the harness's own command does
            log_samples=False,
        )
    return figures_of(found)


def figures_of(found: dict[str, Any]) -> list[Figure]:
    """Returns lm-eval's results as rows, groups before their tasks."""
    groups = {part: group for group, parts in found.get("group_subtasks", {}).items() for part in parts}
    values = {**found.get("groups", {}), **found["results"]}
    rows = []
    for task, metrics in values.items():
        for key, value in metrics.items():
            metric, comma, extracted = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{extracted}")
            samples = found.get("n-samples", {}).get(task, {})
            rows.append(
                Figure(
                    task=task,
                    group=groups.get(task, ""),
                    metric=metric,
                    filter=extracted,
                    higher_is_better=found.get("higher_is_better", {}).get(task, {}).get(metric),
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    rows=samples.get("effective"),
                    fewshot=found.get("n-shot", {}).get(task),
                    version=str(found.get("versions", {}).get(task, "")),
                )
            )
    return rows


def _load_harness() -> None:
    """Makes lm-eval importable, after this environment's own packages."""
    folder, _ = check_installed()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the harness's own command does
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator  # it sets up logging

    # Progress is told by the reporter, and errors by exceptions.
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    for name in ("huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    own = logging.getLogger("lm_eval")
    own.handlers, own.propagate = [_SAID], False


def _checked(entry: str, evaluation: Evaluation) -> dict[str, int]:
    """Returns the rows of each task of an entry."""
    with _within(entry), _explained(entry):
        names, manager = _names(entry)
        tasks = manager.load(names)["tasks"]
        if not tasks:
            raise ConfError(f"evaluation.tasks: {entry} contains no task")
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfError(
                    f"evaluation.tasks: {entry}: the task {name} runs code that the model writes, which is not done here"
                )
            if getattr(task, "MULTIMODAL", False):
                raise ConfError(f"evaluation.tasks: {entry}: the task {name} needs a model that reads images or sound")
            if unknown := [metric for metric, f in getattr(task, "_metric_fn_list", {}).items() if f is None]:
                raise ConfError(f"evaluation.tasks: {entry}: the task {name} has an unknown metric: {unknown[0]}")
            fewshot = task.get_config("num_fewshot")
            if fewshot is None or (evaluation.task_fewshot is not None and fewshot != 0):
                task.set_config(key="num_fewshot", value=evaluation.task_fewshot or 0)
            task.set_fewshot_seed(seed=1234)
            task.build_all_requests(limit=1, rank=0, world_size=1)
            if not task.instances:
                raise DataError(f"evaluation.tasks: {entry}: the task {name} has no rows")
        return {name: len(task.eval_docs) for name, task in tasks.items()}


def _names(entry: str) -> tuple[list[str], Any]:
    """Returns what lm-eval calls the tasks of an entry, and the manager that knows them. Raises ConfError."""
    from lm_eval.tasks import TaskManager

    if not is_task_path(entry):
        manager = TaskManager()
        if entry not in manager.task_index:
            nearest = nearest_names(entry, manager.all_tasks)
            raise ConfError(
                f"evaluation.tasks: lm-eval has no task, group or tag {entry}"
                f"{f'; did you mean {nearest[0]}?' if nearest else ''} (a task file needs a slash or .yaml in its name)"
            )
        return [entry], manager
    path = Path(entry)
    files = _task_files(path) if path.is_dir() else {path: _read(path)}
    if path.is_file() and not ({"task", "group", "class"} & files[path].keys()):
        raise ConfError(f"evaluation.tasks: {path} has neither a task nor a group: it is no task file of lm-eval")
    groups = [parts["task"] for parts in files.values() if isinstance(parts.get("task"), list)]
    manager = TaskManager(include_path=[path] if path.is_dir() else None, include_defaults=bool(groups))
    if path.is_file():
        return [str(path)], manager
    members = {part if isinstance(part, str) else part.get("task") for group in groups for part in group}
    names = [parts.get("group") or parts.get("task") for parts in files.values()]
    return [str(name) for name in names if name and name not in members], manager


def _task_files(folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the contents of a folder's task files, without files that others include. Raises ConfError if there is
    none, or one is broken: lm-eval itself skips these."""
    files = {path: _read(path) for path in sorted(folder.rglob("*.yaml")) if path.is_file()}
    files = {path: parts for path, parts in files.items() if {"task", "group"} & parts.keys()}
    if not files:
        raise ConfError(f"evaluation.tasks: {folder} contains no task file (*.yaml with a key task or group)")
    return files


def _read(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        parts: dict[str, Any] = load_yaml(path, resolve_func=False)
    except Exception as error:  # of YAML, of included files, of anything in them
        raise ConfError(f"evaluation.tasks: {path} cannot be read: {_first_lines(error)}") from error
    return parts


@contextlib.contextmanager
def _within(entry: str) -> Iterator[None]:
    """Works in the folder of a local task, to which the paths of its data are relative."""
    path = Path(entry)
    folder = path.parent if path.suffix in TASK_SUFFIXES else path
    with contextlib.chdir(folder) if is_task_path(entry) and folder.is_dir() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _explained(entry: str) -> Iterator[None]:
    """Turns exceptions of lm-eval and of what it uses into DataErrors that name the entry."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    _SAID.last = ""
    try:
        yield
    except LlmRayError:
        raise
    except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        off = ", and HF_HUB_OFFLINE disables downloads" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"evaluation.tasks: {entry} needs data from the hub, which are not in the local cache and cannot be "
            f"downloaded ({_first_lines(error)}){off}: run the task once while connected, or write a task file that "
            "reads local data (dataset_path: json, dataset_kwargs: {data_files: …})"
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f"evaluation.tasks: {entry} needs a file that is not here"
            f"{', nor on the hub, if that can be reached' if 'Hub' in str(error) else ''}: {_first_lines(error)}"
        ) from error
    except Exception as error:  # a task is code and data of others: anything can be wrong in it
        said = f" ({_SAID.last})" if _SAID.last else ""
        raise DataError(f"evaluation.tasks: {entry}: {type(error).__name__}: {_first_lines(error)}{said}") from error


def _first_lines(error: BaseException) -> str:
    """Returns a message in one line, of at most 300 characters, with what caused it."""
    own = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    return (own if cause is None or str(cause) in own else f"{own}: {' '.join(str(cause).split())}")[:300]


@contextlib.contextmanager
def _progress(module: Any, told: Told) -> Iterator[None]:
    """Passes the progress of lm-eval's bars of requests on; it has no other way to tell it."""
    bars = module.tqdm
    module.tqdm = functools.partial(_Bar, told)
    try:
        yield
    finally:
        module.tqdm = bars


class _Bar:
    """What lm-eval uses of a bar of tqdm."""

    def __init__(
        self, told: Told, rows: Iterable[Any] = (), total: int = 0, desc: str = "", disable: bool = False
    ) -> None:
        self._told, self._rows, self._total, self._done = told, rows, total, 0
        self._what = "answers" if "generate" in desc else "requests"

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def update(self, number: int = 1) -> None:
        self._done += number
        self._told(self._done, self._total, self._what)

    def close(self) -> None:
        pass


def names_of(entries: Sequence[str]) -> list[str]:
    """Returns short names of entries for display: of local ones without their folder."""
    return [Path(entry).stem if is_task_path(entry) else entry for entry in entries]
