"""Atomic files and folders: written under a hidden name in the same place, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str, mode: int = 0o666, owner: tuple[int, int] | None = None) -> None:
    """Write `path` in one piece, with permissions `mode` (less the umask); its folder is made. Raises OSError: `path`
    is as it was.

    `owner` (uid, gid) is what root may give it to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode)  # before anything is in it
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
    """Write `value` as indented JSON in one piece."""
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
def replace_folder(path: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `path` when the block ends well; `path` is as it was when it does not.

    One process at a time may do so for a path. Whoever may read the folder may read its files. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():  # a crash between the two renames below
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
    """One process at a time in the block, of all that name the same `file` (made here, and left); others wait. Raises
    OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _settle(folder: Path) -> None:
    """Bring the files of `folder` to the disk; safetensors makes its files readable by their owner alone, which is
    undone."""
    readable = folder.stat().st_mode & 0o444
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | readable)
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_folder(path: Path) -> None:
    """Delete a folder: it is gone at once for whoever looks for it by its name. Raises OSError."""
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)  # of one that was broken off
    path.rename(aside)
    shutil.rmtree(aside)
