"""Data sets of the hub: from its local cache, and over HTTP from a server with the hub's routes."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_ray.data.sources import Row, read
from llm_ray.errors import DataError

REVISION = "0123456789abcdef0123456789abcdef01234567"
# Values that `datasets` changes in mixed columns.
MIXED = [
    {"prompt": "Add.", "completion": {"sum": 3.141592653589793, "small": 1e-12}},
    {"prompt": "42", "completion": "007"},
    {"prompt": "null", "completion": '"quoted"'},
    {"prompt": ["one"], "completion": "3.10"},
]
CARD = """---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/*.jsonl}
  - {split: test, path: plain-test.jsonl}
- config_name: comma
  data_files: comma.csv
- config_name: tables
  data_files: tables/*.parquet
- config_name: packed
  data_files: packed.jsonl.gz
- config_name: fields
  data_files: fields.json
  field: rows
---
A data set.
"""


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def shard(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, bytes] = {
    "README.md": CARD.encode(),
    "plain/a.jsonl": lines(MIXED[:2]),
    "plain/b.jsonl": lines(MIXED[2:]),
    "plain-test.jsonl": lines(MIXED[:1]),
    "comma.csv": b"prompt,completion\nHi,007\n",
    "tables/train-00000-of-00002.parquet": shard(
        [{"prompt": "one", "more": {"a": 1}}, {"prompt": "two", "more": {"b": 2}}]
    ),
    "tables/train-00001-of-00002.parquet": shard([{"prompt": "three"}]),
    "fields.json": json.dumps({"rows": [{"prompt": "Hi", "completion": "Hello"}]}).encode(),
}


def rows_of(source: str) -> list[Row]:
    def fail(error: DataError) -> None:
        raise error

    return list(read(source, fail))


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes files to the cache like huggingface_hub, for the data set org/name; tests run with HF_HUB_OFFLINE."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def lay(files: dict[str, bytes]) -> Path:
        repository = tmp_path / "hub" / "datasets--org--name"
        snapshot = repository / "snapshots" / REVISION
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        (repository / "blobs").mkdir()
        for name, content in files.items():
            blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(blob)
        return snapshot

    return lay


def test_contents_are_as_the_files_have_them(cached: Callable[..., Path]) -> None:
    snapshot = cached(FILES)
    rows = rows_of("org/name")
    assert [row.values for row in rows] == MIXED
    assert rows[2].place == f"{snapshot}/plain/b.jsonl:1"
    assert [row.values for row in rows_of("org/name::test")] == MIXED[:1]
    assert [row.values for row in rows_of("org/name:comma")] == [{"prompt": "Hi", "completion": "007"}]
    assert len(rows_of("org/name::all")) == 5
    assert [row.values for row in rows_of("org/name:tables")] == [
        {"prompt": "one", "more": {"a": 1}},
        {"prompt": "two", "more": {"b": 2}},
        {"prompt": "three"},
    ]


def test_without_a_card_the_names_tell_the_splits(cached: Callable[..., Path]) -> None:
    cached({"data/train.jsonl": lines(MIXED), "data/test.jsonl": lines(MIXED[:1])})
    assert [row.values for row in rows_of("org/name")] == MIXED
    assert len(rows_of("org/name:default:test")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/name::validation", r"data set 'org/name::validation' has no split 'validation'; there are train, test"),
        (
            "org/name:other",
            r"data set 'org/name:other' cannot be loaded: .*'other' not found. Available: \['plain', 'comma', ",
        ),
    ],
)
def test_unknown_split_and_configuration(cached: Callable[..., Path], source: str, message: str) -> None:
    cached(FILES)
    with pytest.raises(DataError, match=message):
        rows_of(source)


def test_half_a_download_is_no_data_set(cached: Callable[..., Path]) -> None:
    cached({name: content for name, content in FILES.items() if name != "tables/train-00001-of-00002.parquet"})
    with pytest.raises(DataError, match=r"data set 'org/name': .* lacks 1 of 2 files, such as train-00001-of-00002"):
        rows_of("org/name:tables")


def test_only_a_card_in_the_cache(cached: Callable[..., Path]) -> None:
    cached({"README.md": b"---\nlicense: mit\n---\n"})
    with pytest.raises(DataError, match=r"data set 'org/name': .*cannot be downloaded from the hub"):
        rows_of("org/name")


def test_what_no_reader_here_reads_is_converted_with_a_line(
    cached: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    cached(
        {
            **FILES,
            "packed.jsonl.gz": gzip.compress(
                lines([{"prompt": "Hi", "more": {"a": 1}}, {"prompt": "Ho", "more": {"b": 2}}])
            ),
        }
    )
    with caplog.at_level(logging.WARNING):
        assert [row.values for row in rows_of("org/name:packed")] == [
            {"prompt": "Hi", "more": {"a": 1}},
            {"prompt": "Ho", "more": {"b": 2}},
        ]
    assert (
        "data set org/name:packed is read as converted by `datasets`, because it has files of an unsupported kind (.gz)"
        in caplog.text
    )
    with caplog.at_level(logging.WARNING):
        assert [row.values for row in rows_of("org/name:fields")] == [{"prompt": "Hi", "completion": "Hello"}]
    assert "its card defines how to read it (field='rows')" in caplog.text


# Over HTTP ------------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's routes for finding, listing and downloading a data set."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(json.loads(body) if body.startswith("{") else parse_qs(body))

    def answer(self, form: dict[str, Any] | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)  # type: ignore[attr-defined]
        api, resolve = "/api/datasets/org/name", "/datasets/org/name/resolve/"
        if (
            path.startswith(resolve)
            and (content := FILES.get(path.removeprefix(resolve).partition("/")[2])) is not None
        ):
            return self.send(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION})
        if path.startswith(f"{api}/paths-info/"):
            return self.send_json([self.entry(name) for name in (form or {}).get("paths", []) if self.entry(name)])
        if path.startswith(f"{api}/tree/"):
            under = path.removeprefix(f"{api}/tree/").partition("/")[2]
            known = {*FILES, *(name.rpartition("/")[0] for name in FILES if "/" in name)}
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            inside = [name for name in sorted(known) if name.startswith(f"{under}/" if under else "")]
            return self.send_json(
                [self.entry(n) for n in inside if deep or "/" not in n.removeprefix(f"{under}/" if under else "")]
            )
        if path == api or path.startswith(f"{api}/revision/"):
            return self.send_json(
                {"id": "org/name", "sha": REVISION, "siblings": [{"rfilename": name} for name in FILES]}
            )
        missing = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
        return self.send(b"{}", {"X-Error-Code": missing, "X-Repo-Commit": REVISION}, status=404)

    def entry(self, name: str) -> dict[str, Any] | None:
        if name in FILES:
            content = FILES[name]
            return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}
        return (
            {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            if any(f.startswith(f"{name}/") for f in FILES)
            else None
        )

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


LOAD = """
import datasets, sys
datasets.load_dataset(sys.argv[1])
print("{}")
"""
READ = """
import json, sys
from llm_ray.data.sources import read
def fail(error): raise error
try:
    print(json.dumps([[row.place, row.values] for row in read(sys.argv[1], fail)]))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def test_over_http_and_then_without(hub: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    """In subprocesses, because huggingface_hub reads its environment only once."""

    def ask(source: str, code: str = READ, **environment: str) -> Any:
        port = hub.server_address[1]
        told = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", code, source], env={**os.environ, **told}, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    rows = ask("org/name")
    assert [values for _, values in rows] == MIXED
    assert rows[2][0].endswith(f"/snapshots/{REVISION}/plain/b.jsonl:1")
    asked: list[str] = hub.asked  # type: ignore[attr-defined]
    assert not any("tables/train" in path and "/resolve/" in path for path in asked)  # from another configuration
    asked.clear()
    assert ask("org/name", HF_HUB_OFFLINE="1") == rows
    assert [values for _, values in ask("org/name::test", HF_HUB_OFFLINE="1")] == MIXED[:1]
    assert not asked
    assert ask("org/other").startswith(
        "DataError: data set 'org/other': no file or folder of that name, and it cannot be downloaded from the hub"
    )
    # Data that was only converted by datasets is better than nothing.
    ask("org/name", LOAD, HF_DATASETS_CACHE=str(tmp_path / "converted"))
    shutil.rmtree(tmp_path / "hub")
    converted = ask("org/name", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "converted"))
    assert [place for place, _ in converted] == [f"org/name, row {number}" for number in range(1, 5)]
    assert converted[0][1]["prompt"] == MIXED[0]["prompt"]
