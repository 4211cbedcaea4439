"""Reading every kind of file, and errors that name file and line for every way to break one."""

from __future__ import annotations

import csv
import datetime as dt
import json
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_ray.data import jsontext, sources
from llm_ray.data.sources import Row, files, read
from llm_ray.errors import DataError

ROWS = [
    {"instruction": f"Question {i}, with a comma?", "output": f'Answer "{i}"\nin two lines: ü 🙂'} for i in range(5)
]


def fail(error: DataError) -> None:
    raise error


def rows_of(source: Path | str) -> list[Row]:
    return list(read(str(source), fail))


def read_skipping(source: Path | str) -> tuple[list[Row], list[str]]:
    bad: list[str] = []
    rows = list(read(str(source), lambda error: bad.append(str(error))))
    return rows, bad


def write(path: Path, kind: str) -> list[int]:
    """Writes ROWS; returns their first lines (in tables, row numbers)."""
    if kind == "array":
        path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
        return [2, 6, 10, 14, 18]
    if kind == "minified":
        path.write_text(json.dumps(ROWS))
        return [1] * 5
    if kind == "lines":
        path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(ROWS)
        return [2, 4, 6, 8, 10]
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    elif kind == "arrow stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(ROWS).schema) as writer:
            writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=2)
    elif kind == "arrow file":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pylist(ROWS).schema) as writer:
            writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=2)
    return [1, 2, 3, 4, 5]


KINDS = [
    ("array", "json"),
    ("minified", "json"),
    ("lines", "json"),
    ("lines", "jsonl"),
    ("csv", "csv"),
    ("parquet", "parquet"),
    ("arrow stream", "arrow"),
    ("arrow file", "arrow"),
]


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_every_kind(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    lines = write(path, kind)
    rows = rows_of(path)
    assert [r.values for r in rows] == ROWS
    assert [r.line for r in rows] == lines
    assert rows[1].place == (
        f"{path}, row 2"
        if suffix in ("parquet", "arrow")
        else f"{path}:{lines[1]}" + (" (element 2)" if kind in ("array", "minified") else "")
    )


@pytest.mark.parametrize(("kind", "suffix"), KINDS[:3] + KINDS[3:5])
def test_byte_order_mark(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    write(path, kind)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [r.values for r in rows_of(path)] == ROWS


def test_text_is_a_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("One.\n\nTwo.")
    assert [(r.line, r.values) for r in rows_of(path)] == [
        (1, {"text": "One."}),
        (2, {"text": ""}),
        (3, {"text": "Two."}),
    ]


def test_semicolons_and_tabs(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for separator in ";\t":
        path.write_text(f"prompt{separator}completion\nHi, you{separator}Hello\n")
        assert rows_of(path)[0].values == {"prompt": "Hi, you", "completion": "Hello"}


def test_folder_is_sorted_and_leaves_other_files_alone(tmp_path: Path) -> None:
    write(tmp_path / "b.json", "array")
    write(tmp_path / "a.parquet", "parquet")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / ".hidden.json").write_text("{}")
    assert files(str(tmp_path)) == [tmp_path / "a.parquet", tmp_path / "b.json"]
    assert [r.values for r in rows_of(tmp_path)] == ROWS + ROWS


def test_saved_data_set(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [r.values for r in rows_of(tmp_path / "saved")] == ROWS


@pytest.mark.parametrize("array", ["[]", " [ ] \n", "\n[\n]\n"])
def test_empty_array(tmp_path: Path, array: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(array)
    assert rows_of(path) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), max_size=8),
    indent=st.none() | st.integers(0, 2),
    chunk=st.integers(1, 40),
)
def test_array_through_a_small_window(
    tmp_path: Path, rows: list[dict[str, object]], indent: int | None, chunk: int
) -> None:
    path = tmp_path / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsontext, "CHUNK", chunk)
        found = rows_of(path)
    assert [r.values for r in found] == rows
    at = 0
    for row in found:  # the line of its brace
        at = text.index("{", at)
        assert row.line == text.count("\n", 0, at) + 1
        at = json.JSONDecoder().raw_decode(text, at)[1]


# Layouts of files from other tools ------------------------------------------------------------------------------------

PLUM = [{"instruction": "Name a fruit.", "output": "Plum"}, {"instruction": "Name a bird.", "output": "Finch"}]
LINES = [json.dumps(row) for row in PLUM]
PRETTY = [json.dumps(row, indent=2) for row in PLUM]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("\n\n" + "\n".join(LINES), [3, 4]),
        ("\n".join(PRETTY), [1, 5]),
        ("\n" + "\n\n".join(PRETTY) + "\n", [2, 7]),
        (f"[\n{LINES[0]},\n{LINES[1]}\n]", [2, 3]),
        (json.dumps(PLUM), [1, 1]),
        (json.dumps({"data": PLUM}), [1, 1]),
        ('{"data": [\n' + ",\n".join(LINES) + "\n]}\n", [2, 3]),
        (json.dumps({"version": "1", "meta": {"by": ["Ann"]}, "rows": PLUM, "count": 2}, indent=1), [9, 13]),
        (json.dumps({"data": PLUM, "info": {"of": [1, 2], "tags": []}}), [1, 1]),
    ],
)
def test_json_in_other_shapes(tmp_path: Path, suffix: str, text: str, lines: list[int]) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(text)
    rows = rows_of(path)
    assert [r.values for r in rows] == PLUM
    assert [r.line for r in rows] == lines


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"tools": [{"name": "lamp", "parameters": {}}], "messages": TURNS},
        {"chat": TURNS, "documents": [{"title": "One", "text": "Two"}]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"prompt": "Hi", "completion": "Hello", "documents": [{"title": "One"}]},
        {"a": [], "b": 1},
        {},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_row_alone_is_a_row(tmp_path: Path, row: dict[str, object], indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row, indent=indent))
    assert [r.values for r in rows_of(path)] == [row]


@pytest.mark.parametrize(
    "line",
    [
        '{"instruction": "one", "output": "a"',
        '{"instruction": "one",',
        '{"instruction": "o\n',
        "{",
        '{"list": [',
        "[",
        "]",
    ],
)
def test_a_broken_first_line_is_passed_over_like_others(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line.rstrip() + "\n" + "\n".join(LINES))
    if line == "[":
        with pytest.raises(DataError, match=r"rows\.jsonl:3: broken JSON in element 1 of the array"):
            read_skipping(path)
        return
    rows, bad = read_skipping(path)
    assert [r.values for r in rows] == PLUM
    assert len(bad) == 1 and bad[0].startswith(f"{path}:1: broken JSON: ")


def test_a_large_object_of_rows_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 300)
    monkeypatch.setattr(jsontext, "CHUNK", 300)
    path = tmp_path / "rows.json"
    for indent in (None, 2):
        path.write_text(json.dumps({"version": "1", "data": PLUM * 50}, indent=indent))
        assert [r.values for r in rows_of(path)] == PLUM * 50
    for key in ("prompt", "notes"):  # a long row is still one row
        path.write_text("\n".join(json.dumps({"id": 1, key: "x" * 400, "docs": [{"of": 1}]}) for _ in range(3)))
        assert len(rows_of(path)) == 3
    path.write_text(json.dumps({"data": PLUM * 50, "test": PLUM}))
    with pytest.raises(DataError, match=r"several lists of rows \(data, test\)"):
        rows_of(path)


HEADER = "instruction,output\n"
BODY = "Name a fruit.,Plum\nName a bird.,Finch\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"\n{HEADER}{BODY}", 3),
        (f"\r\n,,\r\n{HEADER}{BODY}", 4),
        ("instruction,output,,\nName a fruit.,Plum,,\nName a bird.,Finch,,\n,,,\n", 2),
        (f"instruction,output, \n{BODY}", 2),
        (f"{HEADER}Name a fruit.,Plum,,\nName a bird.,Finch, \n\n", 2),
        (f"sep=;\n{HEADER}{BODY}".replace(",", ";"), 3),
        (f'"sep=|"\r\n{HEADER}{BODY}'.replace(",", "|"), 3),
        (f"\nsep=,\n{HEADER}{BODY}", 4),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-8-sig"])
def test_csv_in_other_shapes(tmp_path: Path, text: str, line: int, encoding: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode(encoding))
    rows = rows_of(path)
    assert [(r.line, r.values) for r in rows] == [(line, PLUM[0]), (line + 1, PLUM[1])]


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.csv", "prompt,completion\rHi,Hello\rBye,Bye\r"), ("rows.jsonl", '{"prompt": "Hi"}\r{"prompt": "Bye"}')],
)
def test_lines_that_end_in_a_carriage_return(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert [row.values["prompt"] for row in rows_of(tmp_path / name)] == ["Hi", "Bye"]


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        (
            "rows.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a Git LFS pointer, not the file",
        ),
        ("rows.jsonl", b"\x1f\x8b\x08", "compressed by gzip"),
        ("rows.csv", b"PK\x03\x04\x14", "a ZIP archive, or an Excel sheet"),
        ("rows.json", b"PAR1\x15", r"a Parquet file: let its name end in \.parquet"),
    ],
)
def test_file_that_is_something_else(tmp_path: Path, name: str, head: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(head)
    with pytest.raises(DataError, match=rf"{name}: this is {message}"):
        rows_of(tmp_path / name)


def test_csv_with_an_index(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",instruction,output\n0,Name a fruit.,Plum\n")
    assert rows_of(path)[0].values == {"Unnamed: 0": "0", **PLUM[0]}


def test_csv_text_under_no_name_is_told(tmp_path: Path) -> None:
    """For example an unquoted comma: half an answer must not be used for training."""
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output,,\nName two birds.,Finch, wren,\nName a fruit.,Plum,,\n")
    rows, bad = read_skipping(path)
    assert [r.values for r in rows] == [PLUM[0]]
    assert bad == [f"{path}:2: 3 fields, but the header has 2 columns (instruction, output)"]
    path.write_text("instruction,,output\na,b,c\n")
    with pytest.raises(DataError, match="the header has an empty or repeated column name: 'instruction', '', 'output'"):
        rows_of(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "book.txt"])
def test_text_in_other_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "naïve 🙂"}\r\n{"text": "two"}'.encode(encoding))
    found = [r.values["text"] for r in rows_of(path)]
    assert found == (['{"text": "naïve 🙂"}', '{"text": "two"}'] if name == "book.txt" else ["naïve 🙂", "two"])
    path.write_bytes('{"text": "naïve 🙂"}'.encode("utf-16")[:-3])
    with pytest.raises(DataError, match=f"{name}: not valid UTF-16"):
        rows_of(path)


# Tables hold the rows that a JSON file would --------------------------------------------------------------------------


def test_nulls_that_a_struct_made_are_no_values(tmp_path: Path) -> None:
    """In Parquet, all structs of a column have all fields; null ones come from the calls of other rows."""
    rows = [
        {
            "calls": [{"name": "dim", "arguments": {"level": 2, "rooms": ["hall", None]}}],
            "note": {"by": {"name": "Ann"}},
        },
        {"calls": [{"name": "wake", "arguments": {"hour": 6}}, {"name": "stop", "arguments": {}}], "note": None},
        {"calls": [], "note": {"by": {}}},
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert table.to_pylist()[1]["calls"][0]["arguments"] == {"level": None, "rooms": None, "hour": 6}
    assert [r.values for r in rows_of(tmp_path / "rows.parquet")] == rows
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"arguments": {"a": 1, "b": null}}\n')  # this file contains an explicit null
    assert rows_of(lines)[0].values == {"arguments": {"a": 1, "b": None}}


MIXED = [
    {"prompt": 'Say "hi".', "completion": {"a": None, "b": 2}, "list": ["one", 2, None], "turns": [{"content": "Hi"}]},
    {
        "prompt": ["a"],
        "completion": "text",
        "list": ["x"],
        "turns": [{"content": ["Hi", None]}, {"content": "two\nlines", "to": "Ann"}],
    },
    {"prompt": None, "completion": None, "list": None, "turns": []},
]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_json_texts_that_datasets_wrote_are_parsed(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset, Json

    data = Dataset.from_list(MIXED, on_mixed_types="use_json")
    assert data.features["prompt"] == Json()
    if suffix == "parquet":
        data.to_parquet(tmp_path / "rows.parquet")
    else:
        data.save_to_disk(str(tmp_path / "saved"))
    rows = rows_of(tmp_path / ("rows.parquet" if suffix == "parquet" else "saved"))
    assert [r.values for r in rows] == MIXED


def test_parquets_own_json_type_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pa.array(['"Hi"', '{"a": null}', "007", '"\\ud800"', None])
    table = pa.table({"prompt": pa.ExtensionArray.from_storage(pa.json_(), texts)})
    pq.write_table(table, path, store_schema=False)  # like other writers, without Arrow's schema
    rows, bad = read_skipping(path)
    assert [(r.line, r.values["prompt"]) for r in rows] == [(1, "Hi"), (2, {"a": None}), (3, "007"), (5, None)]
    assert bad == [
        f"{path}, row 4: a value cannot be read: half of a surrogate pair (\\ud800), which is not a character: "
        "write the whole pair, or remove it"
    ]


def test_dates_decimals_and_bytes_become_what_json_has(tmp_path: Path) -> None:
    day, moment = dt.date(2031, 5, 1), dt.datetime(2031, 5, 1, 12, 30, tzinfo=dt.UTC)
    columns = {
        "day": pa.array([day]),
        "moment": pa.array([moment]),
        "nanoseconds": pa.array([moment], pa.timestamp("ns", "UTC")),
        "time": pa.array([dt.time(7, 5)]),
        "price": pa.array([Decimal("3.10")]),
        "count": pa.array([Decimal("3")]),
        "exact": pa.array([Decimal("0.1000000000000000000001")]),
        "bytes": pa.array(["ü".encode()]),
        "image": pa.array([b"\xff\xd8"]),
        "pairs": pa.array([[("a", day), ("b", None)]], pa.map_(pa.string(), pa.date32())),
        "names": pa.array(["Ann"]).dictionary_encode(),
        "days": pa.array([[{"day": day}, None]]),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet")[0].values == {
        "day": "2031-05-01",
        "moment": "2031-05-01T12:30:00+00:00",
        "nanoseconds": "2031-05-01T12:30:00+00:00",
        "time": "07:05:00",
        "price": 3.1,
        "count": 3,
        "exact": "0.1000000000000000000001",
        "bytes": "ü",
        "image": b"\xff\xd8",
        "pairs": {"a": "2031-05-01", "b": None},
        "names": "Ann",
        "days": [{"day": "2031-05-01"}, None],
    }


def test_table_value_that_cannot_be_read_names_its_row(tmp_path: Path) -> None:
    """Its neighbours are read."""
    path = tmp_path / "rows.parquet"
    text = pa.array([b"one", b"caf\xe9", b"three", b"four"])
    texts = pa.Array.from_buffers(pa.string(), 4, text.buffers())
    pq.write_table(pa.table({"text": texts, "day": pa.array([0, 0, 0, 2**31 - 1], pa.date32())}), path)
    rows, bad = read_skipping(path)
    assert [(r.line, r.values["text"]) for r in rows] == [(1, "one"), (3, "three")]
    assert bad[0] == f"{path}, row 2: a value cannot be read: not UTF-8"
    assert bad[1].startswith(f"{path}, row 4: a value cannot be read: ")


# Broken rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "broken JSON: Expecting ',' delimiter at column 8"),
        (b'["a"]', "a row must be a JSON object ({…}), but this is a list"),
        (b"3", "but this is a number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair (\\ud800), which is not a character"),
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' appears twice in an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON: Number of too many digits at column 1"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "one"}\n' + line + b'\n{"a": "\\ud83d\\ude00"}\n')
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    rows, bad = read_skipping(path)
    assert [(r.line, r.values["a"]) for r in rows] == [(1, "one"), (3, "😀")]
    assert len(bad) == 1


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (b'"word"', "but this is a string"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"null", "but this is null"),
        (b"12", "a number"),
    ],
)
def test_element_that_is_no_row(tmp_path: Path, element: bytes, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[\n{"a": 1},\n' + element + b',\n{"a": 3}\n]')
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)
    rows, bad = read_skipping(path)
    assert [r.values for r in rows] == [{"a": 1}, {"a": 3}] and len(bad) == 1


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[\n{"a": 1},\n{"a": 2,\n "b" 3},\n{"a": 4}]', 4, "element 2 of the array: Expecting ':' delimiter"),
        ('[\n{"a": 1}\n{"a": 2}]', 3, "element 1 of the array: expected ',' or ']' after it, found '{'"),
        ('[\n{"a": 1},\n{"a": "tw', 3, "element 2 of the array: the file ends before the array does"),
        ('[\n{"a": 1}', 2, "element 1 of the array: the file ends before the array does"),
        ('[\n{"a": 1},\n', 3, "element 2 of the array: the file ends before the array does"),
        ('[\n{"a": 1},\n]', 3, "element 2 of the array: Expecting value"),
        ('[{"a": 1}]\n[{"a": 2}]', 2, "'[' follows the end of the array"),
    ],
)
def test_broken_array_ends_the_reading_even_when_skipping(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_skipping(path)
    assert str(error.value).startswith(f"{path}:{line}: "), str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"train": [{"a": 1}], "test": [{"a": 2}]}',
            "several lists of rows (train, test): write each into a separate file",
        ),
        (
            '{"instruction": ["one", "two"], "output": ["a", "b"]}',
            "one object of columns or numbered rows (instruction, output)",
        ),
        ('{"instruction": {"0": "one"}, "output": {"0": "a"}}', "orient='records', lines=True"),
        (
            '{"0": {"instruction": "one", "output": "a"}, "1": {"instruction": "two", "output": "b"}}',
            "columns or numbered rows (0, 1)",
        ),
        ('{"data": [{"a": 1}]}\nmore', "rows.json:2: broken JSON"),
        ('{"data": [\n{"a": 1}], "more"\n}', "rows.json:3: broken JSON in object 1: Expecting ':' delimiter"),
        ('{\n"a": 1\n}\n{\n"a": 2,\n', "rows.json:6: broken JSON in object 2: the file ends before the object does"),
    ],
)
def test_json_that_is_no_list_of_rows(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"only one", "1 fields, but the header has 2 columns (prompt, completion)"),
        (b"one,two,three", "3 fields, but the header"),
        (b'"a"b,c', "broken CSV"),
        (b"\xff,c", "not UTF-8"),
    ],
)
def test_broken_csv_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\n"two\nlines",x\n' + line + b"\nlast,y\n")
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"{path}:4: ") and message in str(error.value)
    rows, bad = read_skipping(path)
    assert [(r.line, r.values["completion"]) for r in rows] == [(2, "x"), (5, "y")] and len(bad) == 1


def test_csv_quote_that_never_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match=rf"{path}:3: broken CSV"):
        rows_of(path)


def test_csv_header_repeated(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match="repeated column name"):
        rows_of(path)


def test_text_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"one\ncaf\xe9\nthree\n")
    with pytest.raises(DataError, match=rf"{path}:2: not UTF-8"):
        rows_of(path)
    assert [r.line for r in read_skipping(path)[0]] == [1, 3]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_table_cut_off(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    write(path, "parquet" if suffix == "parquet" else "arrow stream")
    path.write_bytes(path.read_bytes()[:-40] if suffix == "parquet" else b"nothing of the kind")
    with pytest.raises(DataError, match=rf"{path}: not a complete (Parquet|Arrow) file"):
        rows_of(path)


# Invalid sources ------------------------------------------------------------------------------------------------------


def test_no_such_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "tickets.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"tikets\.jsonl: no such file or folder; did you mean .*/tickets\.jsonl"):
        rows_of(tmp_path / "tikets.jsonl")


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(DataError, match=r"supported are \.json"):
        rows_of(tmp_path / "rows.xlsx")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"contains no data file .* only notes\.md, train/"):
        rows_of(tmp_path)


def test_hub_id_offline() -> None:
    with pytest.raises(
        DataError, match=r"data set 'nobody/nothing': no file or folder of that name.*Without internet, copy"
    ):
        rows_of("nobody/nothing")


def test_hub_id_with_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder can be given like a hub id, too."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", "lines")
    monkeypatch.chdir(tmp_path)
    rows = rows_of("org/name::train")
    assert [r.values for r in rows] == ROWS
    assert rows[2].place == f"{folder}/train.jsonl:3"
    with pytest.raises(DataError, match=r"data set 'org/name::test' has no split 'test'; there are train"):
        rows_of("org/name::test")


# Memory ---------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from llm_ray.data.sources import read
def fail(error): raise error
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read(sys.argv[1], fail))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_large_files_are_not_held_in_memory(tmp_path: Path, suffix: str) -> None:
    path, count = tmp_path / f"large.{suffix}", 50_000
    body = "x" * 1000
    makers: dict[str, Callable[[int], str]] = {
        "json": lambda i: f'{"[" if not i else ","}\n{{"prompt": "{i}", "completion": "{body}"}}',
        "jsonl": lambda i: f'{{"prompt": "{i}", "completion": "{body}"}}\n',
        "csv": lambda i: f"{'prompt,completion' + chr(10) if not i else ''}{i},{body}\n",
    }
    with path.open("w") as file:
        file.writelines(makers[suffix](i) for i in range(count))
        file.write("]" if suffix == "json" else "")
    assert path.stat().st_size > 50e6
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(found[0]) == count
    assert int(found[1]) < 20_000  # KiB
