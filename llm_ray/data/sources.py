"""Reads rows of JSON, JSON lines, CSV, Parquet, Arrow and text files, of folders of these, and of data sets on the hub.

Rows are streamed, so files may be larger than memory, and each has its file and line:

    for row in read("/data/tickets.jsonl", on_bad_row): print(row.place, row.values)

For a row that cannot be read, ``on_bad_row`` is called with a :class:`~llm_ray.errors.DataError` that names file and
line. If it returns, reading continues with the next row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from llm_ray.data import hub
from llm_ray.data.jsontext import CHUNK, LONGEST, Broken, Parser, Unsound, Window, may_be_cut, reason
from llm_ray.datafiles import DATA_SUFFIXES, HUB_ID, TABLES, data_files
from llm_ray.errors import DataError
from llm_ray.models.folder import LFS_POINTER
from llm_ray.nearest import nearest_names

if TYPE_CHECKING:
    import pyarrow as pa

OnBadRow = Callable[[DataError], None]

TEST_WORDS = {
    "test",
    "tests",
    "testing",
    "valid",
    "validation",
    "validate",
    "val",
    "dev",
    "eval",
    "evaluation",
    "heldout",
    "holdout",
}
CUT_OFF = "the file ends before the array does: it may have been cut off"
SEPARATORS = ",;\t"
SEP_LINE = re.compile(r"\"?sep=(?P<separator>.)\"?\s*", re.IGNORECASE)  # a convention of Excel
INDEX = "Unnamed: 0"
"""Name of a CSV's first column if it has none: pandas writes its index so, and uses this name on reading."""
OTHERWISE = {
    LFS_POINTER: "a Git LFS pointer, not the file: fetch it (git lfs pull)",
    b"PK\x03\x04": "a ZIP archive, or an Excel sheet: unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel sheet: save it as CSV",
    b"\x1f\x8b": "compressed by gzip: unpack it (gunzip)",
    b"\xfd7zXZ": "compressed by xz: unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it (unzstd)",
    b"PAR1": "a Parquet file: let its name end in .parquet",
}
"""First bytes of files whose content does not match their name."""
ROW_COLUMNS = ("messages", "conversations", "prompt", "instruction", "text")
"""Columns of the known formats: an object that has one is a row."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read: its file (or hub id), first line (in tables, the row's number), and columns."""

    file: str
    line: int
    values: dict[str, Any]
    element: int | None = None
    """Its number in a JSON array, whose rows may all be on one line."""

    @property
    def place(self) -> str:
        """File and line, for error messages."""
        return place(self.file, self.line) + (f" (element {self.element})" if self.element else "")


def place(file: str | Path, line: int) -> str:
    """Returns ``file:line``, or for tables ``file, row n``; both count from 1."""
    table = not str(file).endswith(DATA_SUFFIXES) or str(file).endswith(TABLES)
    return f"{file}, row {line}" if table else f"{file}:{line}"


def read(source: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yields the rows of one entry of ``data.train``: a file, a folder, or a hub id (``id[:configuration[:split]]``).

    Raises :class:`DataError` if a file does not exist, has an unsupported type, or is damaged so that reading cannot
    continue.
    """
    for file in files(source):
        if isinstance(file, str):
            yield from _hub(file, on_bad_row)
        else:
            yield from _file(file, on_bad_row)


def files(source: str) -> list[Path | str]:
    """Returns the files of one entry of ``data.train``, those of a folder sorted by name; a hub id is returned as a
    ``str``. Raises :class:`DataError` if there are none."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = data_files(path)
        if not found:
            inside = ", ".join(p.name + "/" * p.is_dir() for p in sorted(path.iterdir())[:8]) or "nothing"
            raise DataError(f"{path}: this folder contains no data file ({', '.join(DATA_SUFFIXES)}), only {inside}")
        return list(found)
    if path.exists():
        return [path]
    if path.suffix.lower() in DATA_SUFFIXES or not HUB_ID.fullmatch(source):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = nearest_names(path.name, siblings)
        raise DataError(
            f"{path}: no such file or folder" + (f"; did you mean {path.parent / nearest[0]}?" if nearest else "")
        )
    return [source]


def named_to_test(source: str) -> list[str]:
    """Returns the files of a folder that are named like test or validation data, if others are not: ``test.jsonl`` beside
    ``train.jsonl``."""
    found = files(source) if Path(source).expanduser().is_dir() else []
    marked = [
        str(file)
        for file in found
        if isinstance(file, Path) and TEST_WORDS & set(re.split(r"[^a-z]+", file.stem.lower()))
    ]
    return marked if len(marked) < len(found) else []


def _file(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    readers: dict[str, Callable[[Path, OnBadRow], Iterator[Row]]] = {
        ".json": _json,
        ".jsonl": _json,
        ".csv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".txt": _text,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unsupported file type; supported are {', '.join(DATA_SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(32)
        for mark, kind in OTHERWISE.items():
            if head.startswith(mark) and not (mark == b"PAR1" and reader is _parquet):
                raise DataError(f"{path}: this is {kind}")
        yield from reader(path, on_bad_row)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:  # UTF-16 or UTF-32; errors in UTF-8 are reported by row
        raise DataError(
            f"{path}: not valid {error.encoding.upper()}, although its first bytes announce it: save it as UTF-8"
        ) from error


# JSON -----------------------------------------------------------------------------------------------------------------


def _json(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Reads one object per line, consecutive objects that span lines, or an array of objects, either alone or under a key
    of a single object."""
    shape, key = _shape(path)
    if shape == "lines":
        yield from _json_lines(path, on_bad_row)
        return
    with open_text(path) as file:
        window = Window(file)
        if shape == "objects":
            yield from _json_objects(window, path, on_bad_row)
        elif shape == "array":
            yield from _json_array(window, path, on_bad_row)
        else:
            yield from _json_wrapped(window, path, key, on_bad_row)
        if extra := window.peek():
            end = "array" if shape == "array" else "object that contains the rows"
            raise DataError(
                f"{place(path, window.line)}: {extra!r} follows the end of the {end}: a .json file contains one "
                "array, or one object per line"
            )


def _shape(path: Path) -> tuple[Literal["lines", "objects", "array", "wrapped"], str]:
    """Detects the layout of rows from the file's beginning; for a wrapped array, with its key."""
    with open_text(path) as file:
        head = file.read(CHUNK)
        ended = not file.read(1)
    head = head.lstrip()
    first, _, rest = head.partition("\n")
    parser = Parser()
    if head.startswith("["):
        return ("lines" if path.suffix.lower() == ".jsonl" and rest.strip() and _parses(parser, first) else "array"), ""
    if not head.startswith("{"):
        return "lines", ""
    try:
        value, end = parser.decode(head)
    except (json.JSONDecodeError, RecursionError) as error:
        cut = not ended and may_be_cut(error, head)
        if cut and (key := _rows_begin(head)):
            return "wrapped", key
        over_lines = isinstance(error, json.JSONDecodeError) and (cut or error.pos > len(first)) and rest.strip()
        return (
            "objects" if over_lines and not any(_parses(parser, line) for line in rest.split("\n", 5)[:5]) else "lines"
        ), ""
    if ended and not head[end:].strip() and (key := _rows_key(path, value)):
        return "wrapped", key
    return ("objects" if "\n" in head[:end] else "lines"), ""


def _parses(parser: Parser, line: str) -> bool:
    """Whether the line is an object or array by itself."""
    try:
        return line[:1] in ("{", "[") and bool(parser.parse(line))
    except (ValueError, RecursionError):
        return False


def _is_row(value: object) -> bool:
    """Whether an element of a list may be a row: an object that is not a turn of a conversation or a function."""
    return isinstance(value, dict) and not (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys() or "function" in value
    )


def _rows_key(path: Path, whole: dict[str, Any]) -> str:
    """Returns the key under which a file's only object contains the rows; empty if the object itself is a row. Raises
    DataError for other layouts."""
    values = list(whole.values())
    columns = all(isinstance(value, list) and value and not any(isinstance(e, dict) for e in value) for value in values)
    columns &= (len(whole) > 1 or any(name in whole for name in ROW_COLUMNS)) and len(
        {len(v) for v in values if isinstance(v, list)}
    ) == 1
    numbered = all(map(_numbered, values)) or (_numbered(whole) and all(isinstance(value, dict) for value in values))
    if values and (columns or numbered):
        raise DataError(
            f"{path}: one object of columns or numbered rows ({', '.join(list(whole)[:5])}), not a list of rows: "
            "write an array of objects, or one object per line (pandas: to_json(…, orient='records', lines=True))"
        )
    if any(name in whole for name in ROW_COLUMNS):
        return ""
    keys = [key for key, value in whole.items() if isinstance(value, list) and value and all(map(_is_row, value))]
    if len(keys) > 1:
        raise DataError(
            f"{path}: one object with several lists of rows ({', '.join(keys)}): write each into a separate file"
        )
    turns = any(
        isinstance(value, list) and value and isinstance(value[0], dict) and not _is_row(value[0]) for value in values
    )
    return keys[0] if keys and not turns else ""


def _numbered(value: object) -> bool:
    """Whether an object's keys are numbers, as in pandas' output keyed by index."""
    return isinstance(value, dict) and bool(value) and all(key.isdecimal() for key in value)


def _rows_begin(head: str) -> str:
    """Returns the key under which a list of rows starts in `head`, the beginning of a large object; empty if none
    does."""
    window = Window(io.StringIO(head))
    window.pop()
    try:
        while True:
            key, _ = window.value()
            window.pop()  # the colon
            if window.peek() != "[":
                window.value()
            else:
                window.pop()
                first, _ = window.value()
                return str(key) if _is_row(first) and key not in ROW_COLUMNS else ""
            window.pop()  # the comma
    except Broken:
        return ""


def _json_row(window: Window, path: Path, element: int | None, on_bad_row: OnBadRow, of: str) -> Iterator[Row]:
    """Yields the window's next value as a row. Raises DataError for broken JSON, after which the next row cannot be
    located."""
    try:
        value, text = window.value()
    except Broken as error:
        end = "does: it may have been cut off"
        why = str(error) or f"the file ends before the {'array' if element else 'object'} {end}"
        where = f"{place(path, window.line)}: broken JSON in {of}"
        raise DataError(f"{where}: {why}. The next row cannot be located, so this one cannot be skipped") from None
    try:
        row = _object(window.parser, text, path, window.line, value)
    except DataError as bad:
        on_bad_row(bad)
    else:
        yield replace(row, element=element)


def _json_objects(window: Window, path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    number = 0
    while window.peek():
        number += 1
        yield from _json_row(window, path, None, on_bad_row, f"object {number}")


def _json_array(window: Window, path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yields the objects of the array that starts here."""
    window.pop()
    number = 0
    if window.peek() == "]":
        window.pop()
        return
    while True:
        number += 1
        of = f"element {number} of the array"
        yield from _json_row(window, path, number, on_bad_row, of)
        character = window.pop()
        if character == "]":
            return
        if character != ",":
            why = f"expected ',' or ']' after it, found {character!r}" if character else CUT_OFF
            where = f"{place(path, window.line)}: broken JSON in {of}"
            raise DataError(f"{where}: {why}. The next row cannot be located, so this one cannot be skipped")


def _json_wrapped(window: Window, path: Path, rows: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yields the rows under the key `rows` of a single object."""
    window.pop()
    try:
        while True:
            key, _ = window.value()
            if window.pop() != ":":
                raise Broken("expected ':'")
            if key == rows:
                yield from _json_array(window, path, on_bad_row)
            else:
                value, _ = window.value()
                if isinstance(value, list) and value and all(map(_is_row, value)):
                    raise DataError(
                        f"{path}: one object with several lists of rows ({rows}, {key}): write each into a separate "
                        "file"
                    )
            if (character := window.pop()) == "}":
                return
            if character != ",":
                raise Broken(f"expected ',' or '}}', found {character!r}" if character else "")
    except Broken as error:
        why = str(error) or "the file ends before the object does: it may have been cut off"
        raise DataError(
            f"{place(path, window.line)}: broken JSON in the object that contains the rows: {why}"
        ) from None


def _json_lines(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    parser = Parser()
    with open_text(path, newline="") as file:
        for line, text in enumerate(file, 1):
            if not (text := text.rstrip()):
                continue
            try:
                row = _object(parser, None, path, line, parser.parse(text))
            except (json.JSONDecodeError, RecursionError, Unsound) as error:
                on_bad_row(DataError(f"{place(path, line)}: {reason(error)}"))
            except DataError as error:
                on_bad_row(error)
            else:
                yield row


def _object(parser: Parser, text: str | None, file: Path, line: int, value: object) -> Row:
    """Returns a parsed value as a row; with `text`, from which it was parsed, checks it first (:meth:`Parser.check`)."""
    try:
        if text is not None:
            parser.check(text, value)
    except (Unsound, RecursionError) as error:
        raise DataError(f"{place(file, line)}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place(file, line)}: a row must be a JSON object ({{…}}), but this is {_kind(value)}")
    return Row(str(file), line, value)


def _kind(value: object) -> str:
    kinds = {
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), type(value).__name__)


# Text files -----------------------------------------------------------------------------------------------------------


def open_text(path: Path, newline: Literal["", "\n"] = "\n") -> TextIO:
    """Opens a file as UTF-8, or as UTF-16 or UTF-32 if its first bytes say so. Bytes that are not UTF-8 become lone
    surrogates.

    With `newline` "", a lone carriage return also ends a line, as written by Excel for Mac."""
    with path.open("rb") as file:
        head = file.read(4)
    marks = [
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ]
    encoding = next((name for mark, name in marks if head.startswith(mark)), "utf-8-sig")
    if len(head) == 4 and head.count(0) == 2:  # UTF-16 without a BOM: every other byte of Latin letters is zero
        encoding = {b"\0\0": "utf-16-le"}.get(head[1::2], {b"\0\0": "utf-16-be"}.get(head[::2], encoding))
    return path.open(encoding=encoding, errors="surrogateescape", newline=newline)


def _csv(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Reads rows under a header line, separated by commas, semicolons or tabs, whichever the header has most of, or by
    the character that a line ``sep=`` names."""
    csv.field_size_limit(LONGEST)
    with open_text(path, newline="") as file:
        before, header = 0, file.readline()
        while header and not header.strip(SEPARATORS + " \r\n"):
            before, header = before + 1, file.readline()
        separator = max(SEPARATORS, key=header.count)
        if separator_line := SEP_LINE.fullmatch(header):
            separator = separator_line["separator"]
            before, header = before + 1, file.readline()
        reader = csv.reader(chain([header], file), delimiter=separator, strict=True)
        columns = next(reader, [])
        while len(columns) > 1 and not columns[-1].strip():
            columns.pop()
        if not columns:
            return
        if "" in columns[1:] or len(set(columns)) < len(columns):
            raise DataError(
                f"{place(path, before + 1)}: the header has an empty or repeated column name: "
                f"{', '.join(map(repr, columns))}"
            )
        names = [columns[0] or INDEX, *columns[1:]]
        while True:
            line = before + reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                on_bad_row(DataError(f"{place(path, line)}: broken CSV: {error}"))
                continue
            if not any(cell.strip() for cell in cells):
                continue
            while len(cells) > len(names) and not cells[-1].strip():
                cells.pop()
            if len(cells) != len(names):
                header = ", ".join(name for name in columns if name)
                on_bad_row(
                    DataError(
                        f"{place(path, line)}: {len(cells)} fields, but the header has {len(names)} columns ({header})"
                    )
                )
            elif not _utf8("".join(cells)):
                on_bad_row(DataError(f"{place(path, line)}: not UTF-8: save the file as UTF-8"))
            else:
                yield Row(str(path), line, dict(zip(names, cells, strict=True)))


def _text(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Reads each line as a row with the column ``text``, including empty lines, which a processor may need."""
    with open_text(path) as file:
        for line, text in enumerate(file, 1):
            if _utf8(text):
                yield Row(str(path), line, {"text": text.removesuffix("\n").removesuffix("\r")})
            else:
                on_bad_row(DataError(f"{place(path, line)}: not UTF-8: save the file as UTF-8"))


def _utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Tables ---------------------------------------------------------------------------------------------------------------


def _parquet(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(str(path), file.schema_arrow, file.iter_batches(batch_size=256), on_bad_row)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a complete Parquet file: {error}") from error


def _arrow(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Reads both Arrow formats: the stream, as written by ``datasets``, and the file with a footer (Feather 2)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
                yield from _batches(str(path), file.schema, batches, on_bad_row)
            else:
                source.seek(0)
                stream = pa.ipc.open_stream(source)
                yield from _batches(str(path), stream.schema, stream, on_bad_row)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a complete Arrow file: {error}") from error


def _batches(file: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yields the rows of a table's batches with the values that a JSON file would have (see :func:`_converter`)."""
    converters = {field.name: convert for field in schema if (convert := _converter(field.type))}
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 256):
            for values in _python(batch.slice(start, 256)):
                number += 1
                try:
                    if isinstance(values, ValueError | OverflowError):
                        raise values
                    row = values | {
                        name: convert(values[name]) for name, convert in converters.items() if values[name] is not None
                    }
                except (ValueError, OverflowError, RecursionError) as error:
                    why = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
                    on_bad_row(DataError(f"{place(file, number)}: a value cannot be read: {why}"))
                else:
                    yield Row(file, number, row)


def _python(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | ValueError | OverflowError]:
    """Yields the batch's rows, or the error for one that has no Python value (text that is not UTF-8, a date out of
    range)."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            yield error
        else:
            for i in range(batch.num_rows):
                yield from _python(batch.slice(i, 1))


def _converter(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Returns a function that converts a column's Python values (never None) to those that a JSON file would have; None
    if they already are.

    Null fields of structs, which have all fields in all rows, are left out. Texts of the extension type arrow.json, as
    which ``datasets`` stores mixed values, are parsed, and their nulls kept. Dates and times become text.
    """
    import pyarrow as pa
    from pyarrow import types

    if types.is_struct(kind):
        fields = {field.name: _converter(field.type) for field in kind}
        return lambda value: {
            name: convert(inner) if (convert := fields[name]) else inner
            for name, inner in value.items()
            if inner is not None
        }
    if types.is_map(kind):
        item = _converter(kind.item_type) or (lambda inner: inner)
        return lambda pairs: {key: None if inner is None else item(inner) for key, inner in pairs}
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if isinstance(kind, pa.JsonType):
        return _json_text
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.UuidType):
        return _converter(kind.storage_type)
    if types.is_nested(kind) and hasattr(kind, "value_type"):  # the five kinds of lists
        if not (element := _converter(kind.value_type)):
            return None
        return lambda values: [None if inner is None else element(inner) for inner in values]
    known = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    known = known or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return None if known else _plain


def _json_text(text: str) -> Any:
    try:
        return Parser().parse(text)
    except json.JSONDecodeError:
        return text  # datasets stores a text unquoted if its lenient parser accepts it as JSON, such as 007


def _plain(value: Any) -> Any:
    """Converts dates and times to text, decimals to numbers if that is exact, else to text, and bytes to text if they are
    UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # such as an image, in a column that may not be used
    if isinstance(value, Decimal):
        number = int(value) if value == value.to_integral_value() else float(value)
        return number if Decimal(repr(number)) == value else str(value)
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _hub(source: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Reads a data set of the hub (or its cache): ``id``, ``id:configuration``, ``id:configuration:split``,
    ``id::split``."""
    found = hub.resolve(source)
    if why := found.conversion(DATA_SUFFIXES):
        line = "data set %s is read as converted by `datasets`, because %s: check it with llm-ray data preview"
        logging.getLogger(__name__).warning(line, source, why)
        table = found.converted().data
        yield from _batches(source, table.schema, table.to_batches(), on_bad_row)
    else:
        for file in found.download():
            yield from _file(file, on_bad_row)
