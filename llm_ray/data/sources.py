"""Rows of JSON, JSON lines, CSV, Parquet, Arrow and text files, of folders of these, and of data sets on the hub.

Rows are read one after the other, so that files may be larger than memory, and each knows its file and line:

    for row in read("/data/tickets.jsonl", on_bad_row): print(row.place, row.values)

What cannot be read is handed to ``on_bad_row`` as a :class:`~llm_ray.errors.DataError` that names file and line; it may
raise it, or count it and return, and reading goes on with the next row.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llm_ray.errors import DataError

OnBadRow = Callable[[DataError], None]

TABLES = (".parquet", ".arrow")
SUFFIXES = (".json", ".jsonl", ".csv", *TABLES, ".txt")
# What `datasets.save_to_disk` writes beside its Arrow files.
BOOKKEEPING = ("dataset_info.json", "state.json", "dataset_dict.json")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")
CHUNK = 1 << 20  # characters read at once from a JSON array
LONGEST_ELEMENT = 1 << 28  # characters after which a string that has not ended is taken for broken JSON
CUT_OFF = "the file ends before the array does: it may have been cut off"
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read: the file (or hub id), the line it begins on (the row's number in tables), and its columns."""

    file: str
    line: int
    values: dict[str, Any]
    element: int | None = None
    """Its number in a JSON array, which may be one long line."""

    @property
    def place(self) -> str:
        """File and line as an error names them."""
        return place(self.file, self.line) + (f" (element {self.element})" if self.element else "")


def place(file: str | Path, line: int) -> str:
    """``file:line``; for tables, which have no lines, ``file, row n``. Both count from 1."""
    table = not str(file).endswith(SUFFIXES) or str(file).endswith(TABLES)
    return f"{file}, row {line}" if table else f"{file}:{line}"


def read(source: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """The rows of one entry of ``data.train``: a file, a folder, or a hub id (``id[:configuration[:split]]``).

    Raises :class:`DataError` when there is no such file, it is of an unknown kind, or broken beyond going on.
    """
    for file in files(source):
        if isinstance(file, str):
            yield from _hub(file)
        else:
            yield from _file(file, on_bad_row)


def files(source: str) -> list[Path | str]:
    """The files of one entry of ``data.train``, a folder's sorted by name; a hub id stands for itself (a ``str``)."""
    path = Path(source).expanduser()
    if path.is_dir():
        listed = [p for p in sorted(path.iterdir()) if p.name not in BOOKKEEPING and not p.name.startswith(".")]
        found = [p for p in listed if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not found:
            inside = ", ".join(p.name + "/" * p.is_dir() for p in listed[:8]) or "nothing"
            raise DataError(f"{path}: this folder holds no data file ({', '.join(SUFFIXES)}) but {inside}")
        return list(found)
    if path.exists():
        return [path]
    if path.suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(source):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = get_close_matches(path.name, siblings, n=1)
        raise DataError(f"{path}: no such file or folder" + (f"; did you mean {path.parent / nearest[0]}?" if nearest else ""))
    return [source]


def _file(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    readers: dict[str, Callable[[Path, OnBadRow], Iterator[Row]]] = {
        ".json": _json,
        ".jsonl": _json_lines,
        ".csv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".txt": _text,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: files of this kind cannot be read; the kinds known are {', '.join(SUFFIXES)}")
    try:
        yield from reader(path, on_bad_row)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


# JSON ------------------------------------------------------------------------------------------------------------------


def _object(text: str, file: Path, line: int, value: object) -> Row:
    """A row of a parsed JSON value; `text` is what it was parsed from."""
    try:
        # Bytes that were no UTF-8 are lone surrogates by now; a lone \ud800 that was written as an escape is one as well.
        text.encode()
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place(file, line)}: not UTF-8: save the file in that encoding") from error
    if not isinstance(value, dict):
        raise DataError(f"{place(file, line)}: a row must be a JSON object ({{…}}), but this is {_kind(value)}")
    return Row(str(file), line, value)


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _json(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """A ``.json`` file: an array of objects, or (as is often found) JSON lines."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{path}: the file is UTF-16: save it as UTF-8")
    if head.startswith(b"["):
        return _json_array(path, on_bad_row)
    if head.rstrip() == b"{" or head.split(b"\n", 1)[0].rstrip() == b"{":
        raise DataError(f"{path}: one JSON object over several lines is no list of rows: write an array [{{…}}, …], or one object a line")
    return _json_lines(path, on_bad_row)


def _json_lines(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if line == 1 and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{path}: the file is UTF-16: save it as UTF-8")
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8", errors="surrogateescape")
            if not text.strip():
                continue
            try:
                row = _object(text, path, line, json.loads(text.rstrip()))
            except (json.JSONDecodeError, RecursionError) as error:
                on_bad_row(DataError(f"{place(path, line)}: broken JSON: {_reason(error)}"))
            except DataError as error:
                on_bad_row(error)
            else:
                yield row


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"


def _json_array(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """The objects of one array, decoded out of a sliding window of its text, so that lines are known and memory is not filled.

    A broken element ends the reading even where bad rows are skipped: where the next one begins cannot be told.
    """
    decoder = json.JSONDecoder()
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    with path.open("rb") as file:
        window, at, line, ended = "", 0, 1, False  # `line` is the line of window[at]

        def more() -> None:
            nonlocal window, at, ended
            raw = file.read(max(CHUNK, 2 * (len(window) - at)))
            ended = not raw
            window, at = window[at:] + decode(raw, ended), 0

        def next_character() -> str:
            """The next character that is no space, not taken; empty at the end of the file."""
            nonlocal at, line
            while True:
                space = SPACE.match(window, at)
                end = space.end() if space else at
                line += window.count("\n", at, end)
                at = end
                if at < len(window) or ended:
                    return window[at : at + 1]
                more()

        def broken(number: int, why: str) -> DataError:
            where = f"{place(path, line)}: broken JSON in element {number} of the array"
            return DataError(f"{where}: {why}. Where the next row begins cannot be told: it cannot be skipped")

        if next_character() == "\ufeff":
            at += 1
            next_character()
        at += 1  # the bracket that _json saw
        number = 0
        separator = next_character() != "]"  # is there a first element?
        while separator:
            number += 1
            if not next_character():
                raise broken(number, CUT_OFF)
            while True:
                error: json.JSONDecodeError | RecursionError | None = None
                end = at
                try:
                    value, end = decoder.raw_decode(window, at)
                except (json.JSONDecodeError, RecursionError) as caught:
                    error = caught
                if ended or (error is None and end < len(window)):
                    break
                if error and not _may_be_cut(error, window):
                    break
                more()
            if isinstance(error, RecursionError):
                raise broken(number, "nested too deeply")
            if error:
                line += window.count("\n", at, error.pos)
                cut = error.msg.startswith("Unterminated") or not window[error.pos :].strip()
                raise broken(number, CUT_OFF if cut else error.msg)
            try:
                row = _object(window[at:end], path, line, value)
            except DataError as bad:
                on_bad_row(bad)
            else:
                yield replace(row, element=number)
            line += window.count("\n", at, end)
            at = end
            character = next_character()
            if character not in (",", "]"):
                raise broken(number, f"expected ',' or ']' after it, found {character!r}" if character else CUT_OFF)
            separator = character == ","
            at += 1
        if not number:
            at += 1
        if extra := next_character():
            where = place(path, line)
            raise DataError(f"{where}: after the end of the array comes {extra!r}: a .json file holds one array, or one object a line")


def _may_be_cut(error: json.JSONDecodeError | RecursionError, window: str) -> bool:
    """Whether the error may come from the end of the window rather than from the JSON."""
    if isinstance(error, RecursionError):
        return False
    if error.msg.startswith("Unterminated string"):
        return len(window) < LONGEST_ELEMENT
    return error.pos > len(window) - 64


# Text files ------------------------------------------------------------------------------------------------------------


def _csv(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Rows under a header line; separated by commas, semicolons or tabs, whichever the header has most of."""
    csv.field_size_limit(LONGEST_ELEMENT)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
        columns = next(reader, [])
        if len(set(columns)) < len(columns) or "" in columns:
            raise DataError(f"{place(path, 1)}: the header has an empty or a repeated column name: {', '.join(map(repr, columns))}")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                on_bad_row(DataError(f"{place(path, line)}: broken CSV: {error}"))
                continue
            if not cells:
                continue
            if len(cells) != len(columns):
                names = ", ".join(columns)
                on_bad_row(DataError(f"{place(path, line)}: {len(cells)} fields under a header of {len(columns)} columns ({names})"))
            elif not _utf8("".join(cells)):
                on_bad_row(DataError(f"{place(path, line)}: not UTF-8: save the file in that encoding"))
            else:
                yield Row(str(path), line, dict(zip(columns, cells, strict=True)))


def _text(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """A row a line, in the column ``text``, empty lines too (a processor may need them)."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, 1):
            if _utf8(text):
                yield Row(str(path), line, {"text": text.rstrip("\n")})
            else:
                on_bad_row(DataError(f"{place(path, line)}: not UTF-8: save the file in that encoding"))


def _utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Tables ----------------------------------------------------------------------------------------------------------------


def _parquet(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(path, file.iter_batches(batch_size=256))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from error


def _arrow(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Both Arrow formats: the stream that ``datasets`` writes, and the file with a footer (Feather 2)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                yield from _batches(path, (file.get_batch(i) for i in range(file.num_record_batches)))
            else:
                source.seek(0)
                yield from _batches(path, pa.ipc.open_stream(source))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a whole Arrow file: {error}") from error


def _batches(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 256):
            for values in batch.slice(start, 256).to_pylist():
                number += 1
                yield Row(str(path), number, values)


def _hub(source: str) -> Iterator[Row]:
    """A data set of the hub (or of the hub's cache): ``id``, ``id:configuration``, ``id:configuration:split``, ``id::split``."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, configuration, split = (*source.split(":"), "", "")[:3]
    try:
        rows = load_dataset(name, configuration or None, split=split or "train")
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"data set {name!r}: no file or folder of that name, and the hub's copy cannot be had ({_first_line(error)}). "
            "On a machine without internet copy the data set's files there and name their folder"
        ) from error
    except ValueError as error:  # an unknown configuration or split, offline without a copy in the cache
        raise DataError(f"data set {source!r} cannot be loaded: {_first_line(error)}") from error
    for number, values in enumerate(rows, 1):
        yield Row(source, number, values)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
