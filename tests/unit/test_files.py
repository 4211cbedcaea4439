"""Files and folders that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_ray.files import replace_folder, write_json, write_text


def test_write(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    write_json(file, {"größe": 1, "path": tmp_path})
    assert json.loads(file.read_text(encoding="utf-8")) == {"größe": 1, "path": str(tmp_path)}
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half \ud800")
    assert json.loads(file.read_text(encoding="utf-8"))["größe"] == 1
    assert [p.name for p in file.parent.iterdir()] == ["a.json"]


def test_replace_folder(tmp_path: Path) -> None:
    target = tmp_path / "output"
    for text in ("first", "second"):
        with replace_folder(target) as new:
            (new / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "first"
        assert (target / "a").read_text() == text
    with pytest.raises(KeyboardInterrupt), replace_folder(target) as new:
        (new / "a").write_text("half")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["output"]


def test_debris_of_a_crash(tmp_path: Path) -> None:
    """Killed in the middle of writing, and between the two renames."""
    (tmp_path / ".output.partial").mkdir()
    (tmp_path / ".output.partial" / "half").touch()
    (tmp_path / ".output.old").mkdir()
    (tmp_path / ".output.old" / "a").write_text("old")
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "output") as new:
        assert not list(new.iterdir())
        raise RuntimeError
    assert (tmp_path / "output" / "a").read_text() == "old"


def test_readable_by_whom_the_folder_is(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "output") as new:
        new.chmod(0o750)
        (new / "sub").mkdir()
        (new / "sub" / "weights").touch(mode=0o600)
    assert (tmp_path / "output" / "sub" / "weights").stat().st_mode & 0o777 == 0o640
