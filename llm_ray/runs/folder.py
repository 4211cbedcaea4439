"""A run's folder: lock, conf, lineage, stage marks and results.

    with open_run(conf, find_base(conf.model, conf.paths), force=False) as run:
        inputs = inputs_hash(conf.data, file_hashes(conf.data.train))
        if not run.is_done("prepare", inputs):
            run.begin("prepare", inputs)
            …
            run.mark_done("prepare", inputs, seconds)

Only the process that holds the lock writes here (workers write metrics and checkpoints). Files are written atomically.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ValidationError

import llm_ray
from llm_ray.conf import yamltext
from llm_ray.conf.finetune import FinetuneConf, Stage
from llm_ray.conf.load import dump
from llm_ray.datafiles import data_files
from llm_ray.errors import LlmRayError, RunError
from llm_ray.files import remove_folder, write_json, write_text
from llm_ray.models.load import Base, identity
from llm_ray.runs.metrics import finite

State = Literal["running", "done", "failed", "stopped"]

LOCK, CONF, RUN, PARAMS, RESULT = ".lock", "conf.yaml", "run.json", "params.json", "result.json"
RESULT_KEYS = ("model", "data", "tuning", "training", "evaluation")
"""Sections of the conf that affect a run's results; the others only say where and how it runs."""
PACKAGES = ("ray", "torch", "transformers", "peft")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_BLOCK = 1 << 20
_LOCK_SECONDS = 1.0  # `runs list` holds a lock briefly to test whether it is free


class RunFolder:
    """The folder of one run. :func:`open_run` creates and locks it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lineage(self) -> dict[str, Any]:
        """Returns the contents of run.json; empty if there is none. Raises RunError if it is damaged."""
        return _read_json(self.path / RUN)

    def result(self) -> dict[str, Any]:
        """Returns the contents of result.json; empty if there is none. Raises RunError if it is damaged."""
        return _read_json(self.path / RESULT)

    def is_done(self, stage: Stage, inputs_hash: str) -> bool:
        """Returns whether `stage` was completed with the same inputs."""
        mark = self._marks().get(stage, {})
        return mark.get("inputs") == inputs_hash and "finished" in mark

    def begin(self, stage: Stage, inputs_hash: str) -> bool:
        """Records the start of `stage`. Returns True if the previous attempt had the same inputs, so its leftovers
        (checkpoints) can be reused; False if any leftovers belong to other inputs."""
        mark = self._marks().get(stage, {})
        self._mark(stage, {"inputs": inputs_hash, "began": _now()})
        return mark.get("inputs") == inputs_hash

    def mark_done(self, stage: Stage, inputs_hash: str, seconds: float) -> None:
        """Marks `stage` as completed with these inputs."""
        self._mark(stage, {"inputs": inputs_hash, "finished": _now(), "seconds": round(seconds, 3)})

    def clear(self, stage: Stage) -> None:
        """Removes the mark of `stage`, so that it is repeated from its start."""
        self._mark(stage, None)

    def record(self, **values: Any) -> None:
        """Sets values in run.json, such as `hosts` once the cluster is known."""
        self._write(RUN, self.lineage() | values)

    def set_state(self, state: State, reason: str = "") -> None:
        """Records the run's state and its reason."""
        self.record(state=state, reason=reason, updated=_now())

    def params(self) -> dict[str, Any]:
        """Returns the contents of params.json; empty if there is none. Raises RunError if it is damaged."""
        return _read_json(self.path / PARAMS)

    def write_params(self, params: Mapping[str, Any]) -> None:
        """Writes params.json, the effective hyperparameters."""
        self._write(PARAMS, params)

    def update_result(self, section: str, values: Mapping[str, Any]) -> None:
        """Merges `values` into a section of result.json."""
        result = self.result()
        self._write(RESULT, result | {section: result.get(section, {}) | dict(values)})

    def _marks(self) -> dict[str, dict[str, Any]]:
        marks: dict[str, dict[str, Any]] = self.lineage().get("stages", {})
        return marks

    def _mark(self, stage: Stage, mark: dict[str, Any] | None) -> None:
        marks = {name: other for name, other in self._marks().items() if name != stage}
        self.record(stages=marks | {stage: mark} if mark else marks)

    def _write(self, name: str, value: object) -> None:
        with _told(self.path):
            write_json(self.path / name, finite(value))


@contextlib.contextmanager
def open_run(conf: FinetuneConf, base: Base, force: bool) -> Iterator[RunFolder]:
    """Creates or reopens the folder of the run `conf.name` and locks it until the block ends.

    The state is `running` during the block; afterwards it is `done`, `stopped` (Ctrl-C or a stop request) or `failed`
    with the error's message, unless the block set another. Raises RunError if another process holds the lock, if the
    run was made with a conf that gives other results (unless `force`), or if the folder cannot be written; ModelError
    if the base model does not exist.
    """
    run = RunFolder(conf.run_dir)
    text = dump(conf)
    lineage = _lineage(conf, base, text)  # first, so that missing data or a missing base model leaves no folder behind
    with contextlib.ExitStack() as stack:
        stack.enter_context(_told(run.path))
        run.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked_run(run.path))
        if not force:
            refuse_other_conf(conf, run.path)
        write_text(run.path / CONF, text)
        stop_file(run.path).unlink(missing_ok=True)  # addressed to an earlier process
        run.record(**{"created": _now(), "stages": {}} | run.lineage() | lineage)
        run.set_state("running")
        try:
            yield run
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt) or (
                isinstance(error, LlmRayError) and error.exit_code == 130
            )
            with contextlib.suppress(RunError):  # a full disk: report the first error
                run.set_state("stopped" if stopped else "failed", str(error) or type(error).__name__)
            raise
        finally:
            stop_file(run.path).unlink(missing_ok=True)
        if run.lineage()["state"] == "running":
            run.set_state("done")


def holder(path: Path) -> dict[str, Any] | None:
    """Returns the holder of the lock of the run in `path`: {"host", "pid", "since"}; None if it is free."""
    try:
        with (path / LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(file)
    except OSError:
        return None
    return None


def stop_file(path: Path) -> Path:
    """Returns the file that requests the run's process to stop with a checkpoint; it is removed when the run ends."""
    return path / "checkpoint" / ".stop"


def ask_to_stop(path: Path) -> None:
    """Asks the process that works on the run to stop. Raises RunError if there is none."""
    if holder(path) is None:
        raise RunError(f"the run {path.name} is not running: there is nothing to stop")
    with _told(path):
        stop_file(path).parent.mkdir(exist_ok=True)
        stop_file(path).touch()


def delete_run(path: Path) -> None:
    """Deletes a run with everything it made. Raises RunError if a process works on it or it cannot be deleted."""
    with _told(path), locked_run(path):
        remove_folder(path)


def stored_conf(path: Path) -> dict[str, Any]:
    """Returns the conf of the run, with this version's defaults for new keys. Raises RunError if it cannot be read."""
    try:
        data = yamltext.parse((path / CONF).read_text(encoding="utf-8")).data
        return FinetuneConf.model_validate(data).model_dump(mode="json")
    except (OSError, UnicodeDecodeError, yamltext.Problem, ValidationError) as error:
        made_by = _read_json(path / RUN).get("versions", {}).get("llm_ray", "unknown")
        raise RunError(
            f"{path / CONF} cannot be read by llm-ray {llm_ray.__version__} (it was written by version {made_by}): "
            f"use another name, or --force to start over. ({str(error).splitlines()[0]})"
        ) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys in which two confs differ, with both values."""
    a, b = flat(old), flat(new)
    return {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*b, *a]) if a.get(key) != b.get(key)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested sections into dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def inputs_hash(*parts: object) -> str:
    """Returns the SHA-256 of the parts as canonical JSON; parts may include conf sections and paths."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(sources: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Returns {"path", "sha256", "bytes"} of each file, files of a folder sorted by name; for a hub id only {"hub"}.

    Raises RunError if a file cannot be read.
    """
    entries: list[dict[str, Any]] = []
    for source in sources:
        path = Path(source)
        if not path.exists():
            entries.append({"hub": str(source)})
            continue
        files = data_files(path) if path.is_dir() else [path]
        for file in files:
            try:
                status = file.stat()
                digest = _file_hash(file, status.st_size, status.st_mtime_ns)
            except OSError as error:
                raise RunError(f"{file} cannot be read: {error.strerror}") from error
            entries.append({"path": str(file), "sha256": digest, "bytes": status.st_size})
    return entries


@functools.lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """Returns the SHA-256, cached while size and modification time stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lineage(conf: FinetuneConf, base: Base, text: str) -> dict[str, Any]:
    validation = conf.data.validation if isinstance(conf.data.validation, tuple) else ()
    return {
        "name": conf.name,
        "conf_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "data": {
            "train": file_hashes(conf.data.train),
            "validation": file_hashes(validation),
            "evaluation": file_hashes(conf.evaluation.data or ()),
        },
        "model": identity(base),
        "versions": {
            "llm_ray": llm_ray.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "hosts": [socket.gethostname()],
        "git": _git(),
        "command": shlex.join(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Returns the commit of the current folder, and whether tracked files differ from it; None outside a work tree."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def refuse_other_conf(conf: FinetuneConf, path: Path) -> None:
    """Raises RunError if `path` contains a run whose conf gives other results."""
    if not (path / CONF).exists():
        return
    old, new = stored_conf(path), conf.model_dump(mode="json")
    changed = differences({key: old[key] for key in RESULT_KEYS}, {key: new[key] for key in RESULT_KEYS})
    if changed:
        lines = [f"{key}: {_show(was)} -> {_show(now)}" for key, (was, now) in changed.items()]
        raise RunError(
            "\n  ".join([f"the run {conf.name} exists ({path}) with a different conf:", *lines])
            + "\nUse another name (--set name=…), or --force to replace what depends on these keys."
        )


@contextlib.contextmanager
def locked_run(path: Path) -> Iterator[None]:
    """Holds the lock of a run or of a sweep. On NFS, flock becomes a server-side lock (since Linux 2.6.12), which requires the file to
    be open for writing."""
    with (path / LOCK).open("a+b") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    other = _holder(file)
                    who = (
                        f"process {other['pid']} on {other['host']}, since {other['since']}"
                        if other
                        else "another process"
                    )
                    raise RunError(
                        f"the run {path.name} ({path}) is in use by {who}: wait for it, stop it, or use another name"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                raise RunError(
                    f"{path} is on storage without file locks ({error.strerror}): on NFS, the lock service must be "
                    "running (NFS 4 has it built in)"
                ) from error
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}).encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not unlock while a forked child has the file open


def _holder(file: IO[bytes]) -> dict[str, Any]:
    file.seek(0)
    try:
        found: dict[str, Any] = json.loads(file.read())
    except ValueError:
        return {}
    return found


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns failed writes under `path` into RunErrors that say what to do."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free
        room = f"{free / 2**30:.1f} GiB free"
        if error.errno in _NO_ROOM:
            raise RunError(
                f"no space left for the run's folder {path} ({room}): free some space, or set paths.runs to another "
                "disk"
            ) from error
        about = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        if error.errno in _NOT_ALLOWED and about and (about.is_relative_to(path) or path.is_relative_to(about)):
            raise RunError(
                f"the run's folder {path} cannot be written: {error.strerror}: {error.filename} ({room}): fix its "
                "permissions, or set paths.runs to another folder"
            ) from error
        raise


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no canonical JSON")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(
            f"{path} is not valid JSON ({error}): it was edited or damaged; repair it, or move the folder away"
        ) from error
    return found if isinstance(found, dict) else {}


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
