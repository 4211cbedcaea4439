"""What people send is theirs, has an end, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from llm_ray.errors import DataError
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.uploads import Uploads, harmless_name
from llm_ray.ui.users import Role

ALICE, BOB, EVE = Visitor("alice", Role.USER), Visitor("bob", Role.ADMIN), Visitor("eve", Role.VIEWER)
MOST = 2 * 2**20


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[Uploads]:
    uploads = Uploads(tmp_path, MOST)
    yield uploads
    uploads.close()
    assert not uploads.cache.exists()


def _client(uploads: Uploads, visitor: Visitor) -> TestClient:
    async def receive(request: Request) -> Response:
        request.state.visitor = visitor
        return await uploads.receive(request)

    return TestClient(Starlette(routes=[Route("/upload", receive, methods=["POST"])]))


def _send(uploads: Uploads, visitor: Visitor, content: bytes = b"{}", name: str = "rows.jsonl") -> str:
    answer = _client(uploads, visitor).post("/upload", files={"files": (name, content)})
    assert answer.status_code == 200
    return str(answer.json()[0])


def test_a_file_goes_from_the_cache_into_the_senders_folder(uploads: Uploads, tmp_path: Path) -> None:
    path = _send(uploads, ALICE, b"content")
    taken = uploads.take(ALICE, path)
    assert (taken, taken.read_bytes()) == (tmp_path / "uploads" / "alice" / "rows.jsonl", b"content")
    assert not Path(path).exists()
    assert list(uploads.cache.rglob("*.*")) == []
    modes = {
        oct(part.stat().st_mode & 0o777)
        for part in (taken.parent, taken.parent.parent, uploads.cache, uploads.cache.parent)
    }
    assert modes == {"0o700"} and taken.stat().st_mode & 0o777 == 0o600
    uploads.drop(ALICE, taken)
    assert not taken.exists()


def test_the_same_file_of_two_people_is_two(uploads: Uploads) -> None:
    hers, his = _send(uploads, ALICE), _send(uploads, BOB)
    assert hers != his
    assert uploads.take(ALICE, hers) != uploads.take(BOB, his)


def test_nobody_takes_drops_or_reads_anothers(uploads: Uploads) -> None:
    path = _send(uploads, ALICE)
    assert uploads.may_read("alice", path) and not uploads.may_read("bob", path)
    for wrong in (path, str(Path(path).parent), "/etc/hostname", f"{uploads.cache}/received/bob/../alice/x", ""):
        with pytest.raises(DataError, match="no longer exists: upload it again"):
            uploads.take(BOB, wrong)
    taken = uploads.take(ALICE, path)
    for wrong in (taken, uploads.folder(BOB) / ".." / "alice" / taken.name):
        with pytest.raises(DataError, match="not one of your files"):
            uploads.drop(BOB, wrong)
    assert taken.exists()
    assert not uploads.may_read("alice", str(taken))  # Gradio serves the cache alone


def test_a_second_file_of_a_name_is_kept_beside_the_first(uploads: Uploads) -> None:
    names = [uploads.take(ALICE, _send(uploads, ALICE, content)).name for content in (b"1", b"2", b"3")]
    assert names == ["rows.jsonl", "rows-2.jsonl", "rows-3.jsonl"]


def test_viewers_send_nothing(uploads: Uploads) -> None:
    assert _client(uploads, EVE).post("/upload", files={"files": ("a", b"1")}).status_code == 403
    assert not list(uploads.cache.rglob("*eve*"))


def test_one_that_is_too_large_is_refused_and_leaves_nothing(uploads: Uploads) -> None:
    answer = _client(uploads, ALICE).post("/upload", files={"files": ("a", b"x" * (MOST + 1))})
    assert answer.status_code == 413
    assert "larger than 2 MiB, the limit of this page" in answer.text
    assert [file for file in uploads.cache.rglob("*") if file.is_file()] == []


def test_one_that_does_not_end_is_broken_off_while_it_comes(uploads: Uploads) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        while sent < 50 * MOST:
            sent += 2**16
            yield b"x" * 2**16

    answer = _client(uploads, ALICE).post(
        "/upload", content=endless(), headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 413
    assert [file for file in uploads.cache.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize(
    "body", [b"", b"--b", b"nonsense", b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nhalf']
)
def test_what_is_no_upload_leaves_nothing(uploads: Uploads, body: bytes) -> None:
    answer = _client(uploads, ALICE).post(
        "/upload", content=body, headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 400 or answer.json() == []
    assert [file for file in uploads.cache.rglob("*") if file.is_file()] == []


def test_what_no_screen_took_is_deleted(uploads: Uploads) -> None:
    old, new = Path(_send(uploads, ALICE)), Path(_send(uploads, ALICE))
    os.utime(old.parent.parent, (0, 0))
    uploads.sweep()
    assert not old.exists() and new.exists()


def test_caches_of_pages_that_were_killed_are_deleted(uploads: Uploads, tmp_path: Path) -> None:
    dead = uploads.cache.with_name(uploads.cache.name.rpartition("-")[0] + "-99999999")
    elsewhere = uploads.cache.with_name("another-host-99999999")
    for cache in (dead, elsewhere):
        (cache / "received").mkdir(parents=True)
    Uploads(tmp_path, MOST)
    assert uploads.cache.exists() and elsewhere.exists() and not dead.exists()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\files\\tickets 2026.csv", "tickets_2026.csv"),
        (".bashrc", "bashrc"),
        ("-rf", "rf"),
        ("..", "file"),
        ("", "file"),
        ("Fragen über Öl.jsonl", "Fragen_über_Öl.jsonl"),
    ],
)
def test_harmless_names(name: str, plain: str) -> None:
    assert harmless_name(name) == plain


@given(st.text())
def test_any_name_becomes_one_of_a_file(name: str) -> None:
    plain = harmless_name(name)
    assert plain == Path(plain).name and 0 < len(plain) <= 121 and plain[0] not in ".-" and plain.isprintable()
