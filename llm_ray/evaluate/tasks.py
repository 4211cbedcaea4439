"""Benchmarks of `evaluation.tasks`, run with lm-eval on the base and on the finetuned model, in Ray tasks.

Each worker loads a model once and runs its share of the entries. The figures of an entry are written to the run's
folder as soon as they are known (``tasks/base-HASH.json``), under a hash of everything that they depend on: a run that
was interrupted goes on with the next entry, and another training of the same base does not repeat the base's.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from llm_ray.apart import apart
from llm_ray.cluster import Workers, node_selector, results
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.datafiles import TASK_SUFFIXES, is_task_path
from llm_ray.errors import RunError, Stopped
from llm_ray.evaluate.harness import Figure, check_installed, check_tasks
from llm_ray.files import write_json
from llm_ray.models.load import Base, identity, tokenizer_files
from llm_ray.progress import Bar, Reporter
from llm_ray.runs.folder import file_hashes, inputs_hash, stop_file

Which = Literal["base", "finetuned"]
BOTH: tuple[Which, Which] = ("base", "finetuned")
FOLDER = "tasks"
TASK_KEYS = {"tasks", "task_limit", "task_fewshot", "task_chat_template"}
"""Keys of the section evaluation that are about tasks."""
POLL_SECONDS = 1.0
_SMALL = 2**26  # larger files are told apart by size and time, not read
_WORD = re.compile(r"[\w./*~-]+")


def look_at_tasks(conf: FinetuneConf, reporter: Reporter) -> list[str]:
    """Checks `evaluation.tasks` before anything is trained; returns lines for the user. Raises ConfError or DataError
    as :func:`llm_ray.evaluate.harness.check_tasks` does, ConfError if lm-eval is not installed."""
    if not conf.evaluation.tasks:
        return []
    _, version = check_installed()
    reporter.line(f"Loading the tasks of the evaluation with lm-eval {version} …")
    with apart(check_tasks, conf.evaluation) as work:
        lines = work.result()
    return [f"tasks of lm-eval {version}, on the model before and after: {'; '.join(lines)}"]


def task_inputs(entries: Sequence[str]) -> list[Any]:
    """Returns what identifies entries of `evaluation.tasks` besides their names: hashes of local files."""
    return [_files(entry) for entry in entries]


def evaluate_tasks(
    conf: FinetuneConf, base: Base, workers: Workers, checkpoint: Path, reporter: Reporter, *, fresh: bool = False
) -> dict[str, Any]:
    """Returns lm-eval's version and the figures of all entries, of both models, for result.json. `fresh` repeats what
    an earlier process has finished.

    Raises Stopped if the run is to stop, DataError if a task fails, ConfError if a node has no lm-eval.
    """
    import ray

    _, version = check_installed()
    folder = conf.run_dir / FOLDER
    files = _result_files(conf, base, checkpoint, version)
    for file in folder.glob("*.json") if folder.is_dir() else ():
        if fresh or file not in files.values():
            file.unlink(missing_ok=True)
    due = {key: file for key, file in files.items() if not file.is_file()}
    if known := len(files) - len(due):
        reporter.line(f"  {known} of {len(files)} evaluations are known from before")
    number = conf.runtime.workers
    run = ray.remote(
        num_cpus=workers.cpus,
        max_retries=conf.runtime.max_failures,
        max_calls=1,  # lm-eval stays in no process that does other work
        scheduling_strategy="SPREAD",
        label_selector=node_selector(conf.runtime, workers.cluster),
    )(_share)
    pending = []
    for which in BOTH:
        entries = [(entry, str(file)) for (of, entry), file in due.items() if of == which]
        for rank in range(min(number, len(entries))):
            pending.append(
                run.remote(
                    conf.model_dump(mode="json"),
                    base,
                    str(checkpoint) if which == "finetuned" else None,
                    entries[rank::number],
                    workers.cpus,
                    version,
                    str(folder / f".{which}-{rank}.progress"),
                )
            )
    try:
        with reporter.bar("tasks of lm-eval", len(files)) as bar:
            while pending:
                ready, pending = ray.wait(pending, timeout=POLL_SECONDS)
                results(ready)  # raises
                _show(bar, files.values(), len(files), folder)
                if stop_file(conf.run_dir).exists():
                    raise Stopped(
                        f"{conf.name}: stopped during the tasks of the evaluation as requested. Run the same command "
                        "to continue with those that are left."
                    )
    finally:
        for left in pending:
            ray.cancel(left, force=True)
        for file in folder.glob(".*.progress") if folder.is_dir() else ():
            file.unlink(missing_ok=True)
    return {"harness": f"lm-eval {version}", "tasks": _both(files)}


def _share(
    conf_json: dict[str, Any],
    base: Base,
    checkpoint: str | None,
    entries: list[tuple[str, str]],
    cpus: int,
    version: str,
    progress: str,
) -> None:
    """Runs entries on one model; writes the figures of each to its file."""
    import socket

    import torch

    from llm_ray import cores
    from llm_ray.evaluate.harness import run_task
    from llm_ray.hardware import choose_precision, cpu_flags, torch_dtype
    from llm_ray.models.load import load_tokenizer
    from llm_ray.train.trained import load_trained

    _, found = check_installed()
    if found != version:
        raise RunError(
            f"evaluation.tasks: {socket.gethostname()} has lm-eval {found}, but {version} is used elsewhere: install "
            "the same release on all hosts (site.yml)"
        )
    conf = FinetuneConf.model_validate(conf_json)
    threads, _ = cores.bind(cpus)
    torch.set_num_threads(threads)
    precision, _ = choose_precision(conf.training.precision, cpu_flags())
    model = load_trained(conf, base, Path(checkpoint) if checkpoint else None, torch_dtype(precision))
    model.eval()
    for entry, file in entries:
        write_json(Path(progress), [entry, 0, 0, ""])  # it is still being loaded
        figures = run_task(model, load_tokenizer(base), entry, conf.evaluation, _writer(Path(progress), entry))
        write_json(Path(file), {"entry": entry, "harness": version, "figures": figures})
    Path(progress).unlink(missing_ok=True)


def _writer(file: Path, entry: str) -> Callable[[int, int, str], None]:
    """Returns a function that writes progress for the run's process, at most once a second."""
    last = 0.0

    def told(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            write_json(file, [entry, done, total, what])

    return told


def _show(bar: Bar, files: Iterable[Path], total: int, folder: Path) -> None:
    done = sum(file.is_file() for file in files)
    parts = []
    for file in sorted(folder.glob(".*.progress")) if folder.is_dir() else ():
        try:
            entry, number, requests, what = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        model = file.name[1:].partition("-")[0]
        parts.append(f"{model}: {Path(entry).name}{f', {number} of {requests} {what}' if requests else ''}")
    bar.update(done, total, "; ".join(parts))


def _result_files(conf: FinetuneConf, base: Base, checkpoint: Path, version: str) -> dict[tuple[Which, str], Path]:
    """Returns the file of each model's figures for each entry, named by a hash of all that they depend on."""
    evaluation = conf.evaluation
    options = [evaluation.task_limit, evaluation.task_fewshot, evaluation.task_chat_template, evaluation.batch_size]
    model = [identity(base), file_hashes(tokenizer_files(base)), conf.model.dtype, conf.training.precision]
    trained = [str(checkpoint), (checkpoint / ".metadata").stat().st_mtime_ns]
    return {
        (which, entry): conf.run_dir
        / FOLDER
        / f"{which}-{inputs_hash(version, entry, _files(entry), options, model, trained if which == 'finetuned' else None)[:16]}.json"
        for which in BOTH
        for entry in evaluation.tasks
    }


def _both(files: dict[tuple[Which, str], Path]) -> list[dict[str, Any]]:
    """Returns one row for each metric, with both models' values."""
    read: dict[Which, dict[tuple[str, ...], Figure]] = {which: {} for which in BOTH}
    for (which, _), file in files.items():
        for figure in json.loads(file.read_text(encoding="utf-8"))["figures"]:
            read[which][figure["task"], figure["metric"], figure["filter"]] = figure
    rows = []
    for key, figure in read["finetuned"].items():
        before = read["base"].get(key)
        row = {name: value for name, value in figure.items() if name not in ("value", "stderr")}
        for which, values in (("base", before), ("finetuned", figure)):
            row |= {which: values and values["value"], f"{which}_stderr": values and values["stderr"]}
        rows.append(row)
    return rows


def _files(entry: str) -> list[Any]:
    """Returns hashes of the files of a local task: the task files themselves, and what is named in them."""
    if not is_task_path(entry):
        return []
    path = Path(entry)
    waiting = [path] if path.is_file() else sorted(path.rglob("*.yaml"))
    found: dict[Path, list[Any]] = {}
    while waiting:
        file = waiting.pop(0)
        if file not in found:
            found[file] = _mark(file)
            if file.suffix in TASK_SUFFIXES:
                waiting += _named(file)
    return list(found.values())


def _named(file: Path) -> list[Path]:
    """Returns the files that a task file names, as its data, modules of its functions and included files."""
    named: list[Path] = []
    for word in dict.fromkeys(_WORD.findall(file.read_text(encoding="utf-8", errors="replace"))):
        places = [file.parent / word, file.parent / f"{word.rpartition('.')[0].replace('.', '/')}.py"]
        try:
            found = sorted(file.parent.glob(word)) if "*" in word and not word.startswith("/") else places
            for place in found:
                if place.is_file():
                    named.append(place)
                elif place.is_dir() and place.resolve() not in file.resolve().parents:
                    named += sorted(inner for inner in place.rglob("*") if inner.is_file())
        except (OSError, ValueError):  # the word cannot be a path
            continue
    return named


def _mark(file: Path) -> list[Any]:
    status = file.stat()
    if status.st_size > _SMALL:
        return [str(file), status.st_size, status.st_mtime_ns]
    return file_hashes([file])
