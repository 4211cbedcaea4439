"""The log of answers beside the rows: a line for each passage that was asked about, appended when the answer is there.

A request is known by its hash, so that the same one is not sent again, whatever became of the folder, and another is
(another passage, model or setting). The log also knows the files of rows that were written: one that somebody else
wrote, or changed since, is not replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llm_ray.errors import ConfError
from llm_ray.files import append_alone, whole_lines, write_text

BEGINNING = b'{"'


def key_of(request: dict[str, Any]) -> str:
    """The hash of a request, which is JSON."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Log:
    """`answers` are the texts by the hash of their request."""

    def __init__(self, path: Path, file: TextIO) -> None:
        """Raises ConfError where the file holds something else."""
        self.path, self._file = path, file
        self.answers: dict[str, str] = {}
        self._written: set[tuple[str, str]] = set()
        for number, line in enumerate(whole_lines(path, BEGINNING), 1):
            try:
                entry = json.loads(line)
                if "wrote" in entry:
                    self._written.add((entry["wrote"], entry["sha256"]))
                else:
                    self.answers[entry["key"]] = entry["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfError(
                    f"{path}:{number} is not a line of the log of llm-ray data from-documents: use another --output"
                ) from error

    def keep(self, key: str, text: str, **about: Any) -> None:
        """Append an answer; `about` is for people."""
        self._append({"key": key, "text": text, **about})
        self.answers[key] = text

    def check(self, path: Path) -> None:
        """Raises ConfError where `path` holds something that was not written by this log's command."""
        if path.exists() and (path.name, _hash(path.read_bytes())) not in self._written:
            raise ConfError(
                f"{path} exists, and was not written by this command or was changed since: move it, or use another "
                "--output"
            )

    def write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Write rows as JSON lines in one piece. Raises OSError."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._append({"wrote": path.name, "sha256": _hash(text.encode())})  # before: a crash between is no foreign file
        self._written.add((path.name, _hash(text.encode())))
        write_text(path, text)

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[Log]:
    """The log in `path`, made when it is not there; a torn last line is taken off.

    Raises ConfError when it is no log or another process writes it; DataError when it cannot be written.
    """
    with append_alone(path, str(path)) as file:
        yield Log(path, file)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
