"""``llm-ray data`` on a real conf, model and file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llm_ray.cli.data import data

Run = Callable[..., Result]


@pytest.fixture
def run(smollm2: Path, tmp_path: Path) -> Run:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "Hi", "completion": "Hello ü🙂"}\n{"prompt": "Bye", "completion": "See you."}\n' * 2 + "{\n"
    )
    (tmp_path / "own.yaml").write_text(f"name: own\nmodel:\n  base: {smollm2}\ndata:\n  train: rows.jsonl\n")

    def invoke(verb: str, *arguments: str) -> Result:
        return CliRunner().invoke(data, [verb, "--config", str(tmp_path / "own.yaml"), *arguments], catch_exceptions=False)

    return invoke


def test_preview_marks_supervised_tokens(run: Run) -> None:
    result = run("preview", "-n", "2")  # the bad row comes after these
    assert result.exit_code == 0
    assert "rows.jsonl:1\n<|im_start|>system\n" in result.output
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello ü🙂<|im_end|>⟧\n(" in result.output
    assert result.output.count("⟦") == 3 and "rows.jsonl:3" not in result.output
    assert "supervised)" in result.output and "format prompt_completion; supervised tokens are between ⟦ and ⟧" in result.output


def test_preview_in_colour(run: Run) -> None:
    result = run("preview", "-n", "1", "--color")
    assert "\x1b[32m\x1b[1mHello ü🙂<|im_end|>\x1b[0m" in result.output and "⟦" not in result.output


def test_preview_says_what_is_dropped(run: Run) -> None:
    result = run("preview", "-n", "1", "--set", "data.max_length=16")
    assert "(dropped: the first answer does not end within data.max_length; " in result.output


def test_stats(run: Run) -> None:
    result = run("stats", "--set", "data.on_bad_row=skip", "--json")
    found = json.loads(result.stdout)
    assert (found["read"], found["bad"], found["train"]["rows"], found["validation"]["rows"]) == (4, 1, 3, 1)
    result = run("stats", "--set", "data.on_bad_row=skip")
    assert "4 rows read (prompt_completion), 1 bad skipped" in result.output and "train: 3 rows in 1 sequences" in result.output
