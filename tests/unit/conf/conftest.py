"""A folder to write confs into, with data beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_ray.errors import ConfError

SMALL = """\
name: trial
model:
  base: smollm2-135m-instruct
data:
  train: train.jsonl
"""


def error(load: Callable[..., Any], config: str | Path, *overrides: str, vars_files: tuple[Path, ...] = ()) -> str:
    """The error that loading ends with."""
    with pytest.raises(ConfError) as caught:
        load(config, overrides, vars_files)
    assert caught.value.exit_code == 2
    assert "Traceback" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the confs; the current folder is another one, and LLM_RAY_HOME a third."""
    for name in ("confs", "elsewhere", "home/data"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path / "home"))
    (tmp_path / "confs" / "train.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    return tmp_path / "confs"


@pytest.fixture
def write(folder: Path) -> Callable[[str], Path]:
    """Writes a conf and returns its path."""

    def write(text: str) -> Path:
        file = folder / "my.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write
