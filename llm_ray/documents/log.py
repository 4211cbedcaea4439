"""The log of a model's answers: one line per passage, appended when its answer arrives.

Answers are stored by the hash of their request: the same request is never sent twice, even if the folder changes, but
one with another passage, model or setting is. The log also records the written row files, so that files that are not
its own, or were changed since, are not overwritten.
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
    """Returns the hash of a request, a JSON object."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Log:
    """The answers of a log file: `answers` maps a request's hash to the text."""

    def __init__(self, path: Path, file: TextIO) -> None:
        """Raises ConfError if the file is not such a log."""
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
        """Appends an answer; `about` is informational."""
        self._append({"key": key, "text": text, **about})
        self.answers[key] = text

    def check(self, path: Path) -> None:
        """Raises ConfError if `path` exists and was not written by this log's command."""
        if path.exists() and (path.name, _hash(path.read_bytes())) not in self._written:
            raise ConfError(
                f"{path} exists, and was not written by this command or was changed since: move it, or use another "
                "--output"
            )

    def write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Writes rows as JSON lines, atomically. Raises OSError."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # First, so that a crash in between leaves no unknown file.
        self._append({"wrote": path.name, "sha256": _hash(text.encode())})
        self._written.add((path.name, _hash(text.encode())))
        write_text(path, text)

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[Log]:
    """Opens the log at `path`, creating it if needed; an incomplete last line is removed.

    Raises ConfError if it is another file or is open in another process; DataError if it cannot be written.
    """
    with append_alone(path, str(path)) as file:
        yield Log(path, file)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
