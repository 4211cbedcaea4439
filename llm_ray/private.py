"""Secret files: accessible only to their owner, changed by one process at a time, reloaded by servers on change."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from llm_ray.errors import LlmRayError
from llm_ray.files import locked, write_text

Entry = TypeVar("Entry")
_OPEN_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class PrivateFile(Generic[Entry]):
    """A JSON file that maps keys to entries, mode 0600 in a folder of mode 0700."""

    path: Path
    entries: TypeAdapter[dict[str, Entry]]
    holds: str
    """Name of the entries in error messages, such as `API keys`."""
    error: type[LlmRayError]
    """Exception class for an unusable file."""

    def read(self) -> dict[str, Entry]:
        """Returns the entries. Raises `error` if others can read or replace the file or its content is invalid, and
        OSError."""
        path = self.path
        folder = path.parent.stat().st_mode
        if folder & (stat.S_IWGRP | stat.S_IWOTH) and not folder & stat.S_ISVTX:
            raise self.error(
                f"others can replace files in {path.parent} (mode {folder & 0o777:o}): chmod 700 {path.parent}"
            )
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise self.error(f"{path} is open to others (mode {mode & 0o777:o}): chmod 600 {path}")
            text = file.read()
        try:
            return self.entries.validate_json(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise self.error(
                f"{path} contains no valid {self.holds}: {reason}. Restore it, or remove it and create new {self.holds}"
            ) from error

    def stored(self) -> dict[str, Entry]:
        """Returns the entries for display or change; empty if the file does not exist. Raises `error`."""
        try:
            return self.read()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self.error(f"{self.path} cannot be read: {error.strerror or error}") from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[dict[str, Entry]]:
        """Yields the entries for modification and then writes them atomically, one process at a time. Raises
        `error`."""
        path, lock = self.path, self.path.with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = path.parent.stat()
            owner = (folder.st_uid, folder.st_gid) if os.geteuid() == 0 else None  # a server runs as the folder's owner
            with locked(lock):
                if owner:
                    os.chown(lock, *owner)
                entries = self.stored()
                yield entries
                write_text(path, self.entries.dump_json(entries, indent=2).decode() + "\n", mode=0o600, owner=owner)
        except OSError as error:
            raise self.error(f"{path} cannot be written: {error.strerror or error}") from error


class Watched(Generic[Entry]):
    """A server's view of a file, reloaded when it changes. A file that cannot be read or trusted counts as empty, which
    is logged once."""

    def __init__(self, file: PrivateFile[Entry], log: logging.Logger, consequence: str, missing: str = "") -> None:
        """`consequence` starts the log message ("No API key is accepted"); `missing` ends the message for a missing
        file, which is no error if `missing` is empty."""
        self._file, self._log, self._consequence, self._missing = file, log, consequence, missing
        self._seen: tuple[int, ...] | None = None
        self._opened = -_OPEN_EVERY
        self._entries: dict[str, Entry] = {}
        self._complaint = ""

    def entries(self) -> dict[str, Entry]:
        """Returns the current entries."""
        path, complaint = self._file.path, ""
        try:
            if (now := time.monotonic()) - self._opened >= _OPEN_EVERY:
                os.close(
                    os.open(path, os.O_RDONLY)
                )  # makes NFS ask the server; a stat alone may be answered from its cache for a minute
                self._opened = now
            found = path.stat()
            seen = (
                found.st_ino,
                found.st_ctime_ns,
                found.st_mtime_ns,
                found.st_size,
            )  # ctime also changes with permissions
            if seen == self._seen:
                return self._entries
            try:
                self._entries, self._seen = self._file.read(), seen
            except self._file.error as error:  # holds until the file changes
                self._entries, self._seen, complaint = {}, seen, str(error)
        except FileNotFoundError:
            self._entries, self._seen = {}, None
            complaint = f"{path} does not exist: {self._missing}" if self._missing else ""
        except OSError as error:
            self._entries, self._seen, complaint = {}, None, f"{path} cannot be read: {error.strerror or error}"
        if complaint and complaint != self._complaint:
            self._log.error(f"{self._consequence}: {complaint}")
        self._complaint = complaint
        return self._entries
