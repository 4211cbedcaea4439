"""Files of the fine-tuning API: what is kept, where, for whom, and what is said of one that is broken."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from llm_ray.app.api_files import Files, check_rows, suffix_of
from llm_ray.conf.serve import FinetuningApi
from llm_ray.errors import DataError
from llm_ray.serve.gateway.finetuning.service import Problem, StoredFile

CHAT = json.dumps({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}) + "\n"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "finetuning" / "alice" / "files", FinetuningApi(max_file_mib=0.01, max_stored_mib=0.015))


def sent(files: Files, text: str, label: str = "rows.jsonl", form: str | None = None) -> StoredFile:
    upload = files.begin()
    upload.path.write_text(text)
    try:
        return files.keep(upload, label, form)
    except Problem:
        files.abandon(upload)
        raise


def test_a_file_is_kept_closed_to_others(files: Files, tmp_path: Path) -> None:
    kept = sent(files, CHAT * 3, "../../etc/pass wd.jsonl")
    assert (kept.label, kept.rows, kept.format, kept.bytes) == ("../../etc/pass wd.jsonl", 3, "messages", len(CHAT) * 3)
    assert files.all() == [files.get(kept.id)] == [kept]
    assert files.path(kept).read_text() == CHAT * 3
    assert files.path(kept).is_relative_to(tmp_path / "finetuning" / "alice" / "files")
    for path in (tmp_path / "finetuning").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert path.name == ".lock" or mode & 0o077 == 0 or path.suffix == ".jsonl", path
        if path.is_dir():
            assert mode == 0o700
    files.delete(kept.id)
    assert files.all() == []
    with pytest.raises(Problem, match="There is no file"):
        files.get(kept.id)


@pytest.mark.parametrize("id", ["../../x", "file-../../../x", "", "file-" + "0" * 24, ".lock", "file-\0"])
def test_what_is_no_id_is_no_path(files: Files, id: str) -> None:
    sent(files, CHAT)
    with pytest.raises(Problem) as caught:
        files.get(id)
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("text", "label", "told"),
    [
        (CHAT + '{"messages": 7}\n', "a.jsonl", "a.jsonl:2: 'messages' must be a list of turns"),
        (CHAT + "{broken\n", "a.jsonl", "a.jsonl:2: broken JSON"),
        ('{"prompt": "a"}\n', "", "file:1: cannot detect the format"),
        ('{"messages": [{"role": "assistent", "content": "x"}]}\n', "a.jsonl", "turn 1 of 'messages': role is"),
        ("\n\n", "a.jsonl", "it holds no rows"),
        ("", "a.jsonl", "it is empty"),
        ("prompt,completion\na\n", "a.csv", "a.csv:2: "),
        (CHAT, "a.xlsx", "its name ends in .xlsx; the kinds known are"),
        ("not parquet", "a.parquet", "not a complete Parquet file"),
    ],
)
def test_a_broken_file_is_refused_with_line_and_field_and_nothing_is_left(
    files: Files, tmp_path: Path, text: str, label: str, told: str
) -> None:
    with pytest.raises(Problem) as caught:
        sent(files, text, label)
    assert told in str(caught.value)
    assert str(tmp_path) not in str(caught.value), "no path of the machine"
    assert (caught.value.status, caught.value.param) == (400, "file")
    assert [path.name for path in (tmp_path / "finetuning" / "alice" / "files").iterdir()] in ([], [".lock"])


def test_other_kinds_and_formats(tmp_path: Path) -> None:
    (csv := tmp_path / "a.csv").write_text("prompt,completion\nWho?,Me.\n")
    assert check_rows(str(csv), "auto").format == "prompt_completion"
    (text := tmp_path / "a.txt").write_text("One.\nTwo.\n")
    assert (check_rows(str(text), "auto").format, check_rows(str(text), "auto").rows) == ("text", 2)
    (pairs := tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert check_rows(str(pairs), "auto").format == check_rows(str(pairs), "preference").format == "preference"
    with pytest.raises(DataError, match="openai_preference needs"):
        check_rows(str(pairs), "openai_preference")
    with pytest.raises(DataError, match="alpaca needs"):
        check_rows(str(csv), "alpaca")
    assert suffix_of("rows") == ".jsonl"
    assert suffix_of(r"C:\data\Rows.JSON") == ".json"


def test_a_quota_holds(files: Files) -> None:
    assert files.begin().most == int(0.01 * 2**20)
    large = CHAT * (9000 // len(CHAT))
    kept = sent(files, large)
    left = files.begin()
    assert left.most < 0.01 * 2**20
    assert "more than 0.015 MiB: delete some" in left.over
    with pytest.raises(Problem) as caught:
        sent(files, large)  # as two that come at the same time
    assert (caught.value.status, caught.value.code) == (413, "quota_exceeded")
    files.delete(kept.id)
    assert sent(files, large).rows == kept.rows
