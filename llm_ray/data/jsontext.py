"""A JSON reader for data files: value by value from files of any size, with readable error messages.

Stricter than Python's parser, which silently keeps only the last value of a repeated key.
"""

from __future__ import annotations

import json
import re
from typing import Any, TextIO

CHUNK = 1 << 20  # characters read at once
LONGEST = 1 << 28  # an unterminated string longer than so many characters is an error
SPACE = re.compile(r"[ \t\r\n]*")


class Unsound(ValueError):
    """A JSON value that was parsed, but must not be used; the message says why."""


class Broken(ValueError):
    """Invalid JSON; the message says why, and is empty if the file ends within a value."""


class Parser:
    """Parses JSON texts; reusable."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str, at: int = 0) -> tuple[Any, int]:
        """Returns the value that starts at `at`, and its end. Raises JSONDecodeError or RecursionError."""
        self._repeated.clear()
        try:
            return self._decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # Python's limit for the digits of a number
            raise json.JSONDecodeError("Number of too many digits", text, at) from error

    def parse(self, text: str) -> Any:
        """Returns the value of the whole text. Raises JSONDecodeError, RecursionError or :class:`Unsound`."""
        value, end = self.decode(text, _after_space(text, 0))
        if (end := _after_space(text, end)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        self.check(text, value)
        return value

    def check(self, text: str, value: object) -> None:
        """Raises :class:`Unsound` if `value`, just parsed from `text`, has repeated keys or invalid characters."""
        if self._repeated:
            raise Unsound(f"the key {self._repeated[0]!r} appears twice in an object: keep one")
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes that are not UTF-8 were read as lone surrogates
            raise Unsound("not UTF-8: save the file as UTF-8") from None
        if "\\ud" in text or "\\uD" in text:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                raise Unsound(
                    f"half of a surrogate pair ({half}), which is not a character: write the whole pair, or remove it"
                ) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            self._repeated += [key for key in value if keys.count(key) > 1]
        return value


class Window:
    """A file's text, read as needed, with at most about one value in memory. `line` is that of the character last
    returned by :meth:`peek`."""

    def __init__(self, file: TextIO) -> None:
        self.line = 1
        self.parser = Parser()
        self._file, self._text, self._at, self._ended = file, "", 0, False

    def peek(self) -> str:
        """Returns the next character other than white space, without consuming it; empty at the end of the file."""
        while True:
            end = _after_space(self._text, self._at)
            self._move(end)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def pop(self) -> str:
        """Consumes and returns the next character other than white space."""
        character = self.peek()
        self._at += len(character)
        return character

    def value(self) -> tuple[Any, str]:
        """Consumes the next value; returns it and its text. `line` is where it starts, until the next call. Raises
        :class:`Broken`."""
        if not self.peek():
            raise Broken
        while True:
            error: json.JSONDecodeError | RecursionError | None = None
            end = self._at
            try:
                value, end = self.parser.decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as caught:
                error = caught
            if (
                self._ended
                or (error is None and end < len(self._text))
                or (error and not may_be_cut(error, self._text))
            ):
                break
            self._more()
        if isinstance(error, RecursionError):
            raise Broken("nested too deeply")
        if error:
            self.line += self._text.count("\n", self._at, error.pos)
            cut = error.msg.startswith("Unterminated") or not self._text[error.pos :].strip()
            raise Broken("" if cut else error.msg)
        text, self._at = self._text[self._at : end], end
        self._passed = text.count("\n")
        return value, text

    def _move(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end) + self._passed
        self._at, self._passed = end, 0

    _passed = 0  # line ends within the previous value

    def _more(self) -> None:
        read = self._file.read(max(CHUNK, 2 * (len(self._text) - self._at)))
        self._text, self._at, self._ended = self._text[self._at :] + read, 0, not read


def may_be_cut(error: json.JSONDecodeError | RecursionError, text: str) -> bool:
    """Whether the error may be due to the end of `text`, which is the beginning of a longer one."""
    if isinstance(error, RecursionError):
        return False
    if error.msg.startswith("Unterminated string"):
        return len(text) < LONGEST
    return error.pos > len(text) - 64


def reason(error: json.JSONDecodeError | RecursionError | Unsound) -> str:
    """Returns the message for an exception of :meth:`Parser.parse`."""
    if isinstance(error, Unsound):
        return str(error)
    return f"broken JSON: {f'{error.msg} at column {error.colno}' if isinstance(error, json.JSONDecodeError) else 'nested too deeply'}"


def _after_space(text: str, at: int) -> int:
    space = SPACE.match(text, at)
    return space.end() if space else at
