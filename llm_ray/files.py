"""Atomic writes of files and folders: written under a hidden name in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from llm_ray.errors import ConfError, DataError


def write_text(path: Path, text: str, mode: int = 0o666, owner: tuple[int, int] | None = None) -> None:
    """Writes `path` atomically with permissions `mode` (less the umask), creating its folder. On error, `path` is
    unchanged. Raises OSError.

    `owner` (uid, gid) is set on the file; only root may give a file to another user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode)  # set the mode before there is content
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if owner:
            os.chown(partial, *owner)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Writes `value` atomically as indented JSON. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def whole_lines(path: Path, beginning: bytes) -> Iterator[bytes]:
    """The lines of a file that is appended to. A last one without its end, which was being written when a process was
    killed, is cut off the file when all before it have been taken; only where it begins like `beginning`, as lines of
    the file do. Raises OSError."""
    whole = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n") and line[: len(beginning)] == beginning[: len(line)]:
                file.truncate(whole)
                return
            whole += len(line)
            yield line


@contextlib.contextmanager
def append_alone(path: Path, called: str) -> Iterator[TextIO]:
    """Opens (or creates) and locks a file of lines to append to. `called` is its name in messages.

    Raises ConfError if another process holds the lock, DataError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{called} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfError(f"{called}: another process is writing to it") from error
        yield file


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields a new empty folder that replaces `path` when the block succeeds; otherwise `path` is unchanged.

    Only one process at a time may do this for a path. Files become readable by everyone who may read the folder. Raises
    OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():  # a crash happened between the two renames below
        old.rename(path)
    for debris in (partial, old):
        shutil.rmtree(debris, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _settle(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds an exclusive lock on `file` during the block; others wait. Creates the file and leaves it. Raises
    OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _settle(folder: Path) -> None:
    """Syncs the files of `folder` to disk, and makes them as readable as the folder, since safetensors restricts them
    to their owner."""
    readable = folder.stat().st_mode & 0o444
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | readable)
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_folder(path: Path) -> None:
    """Deletes a folder atomically: it is renamed first, so its name is free at once. Raises OSError."""
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)  # remains of an interrupted deletion
    path.rename(aside)
    shutil.rmtree(aside)
