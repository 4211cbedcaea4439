"""``llm-ray data`` on a real conf, model and file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llm_ray.cli.data import data
from llm_ray.errors import DataError

Run = Callable[..., Result]


@pytest.fixture
def run(smollm2: Path, tmp_path: Path) -> Run:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "Hi", "completion": "Hello ü🙂"}\n{"prompt": "Bye", "completion": "See you."}\n' * 2 + "{\n"
    )
    (tmp_path / "own.yaml").write_text(f"name: own\nmodel:\n  base: {smollm2}\ndata:\n  train: rows.jsonl\n")

    def invoke(verb: str, *arguments: str) -> Result:
        return CliRunner().invoke(
            data, [verb, "--config", str(tmp_path / "own.yaml"), *arguments], catch_exceptions=False
        )

    return invoke


def test_preview_marks_supervised_tokens(run: Run) -> None:
    result = run("preview", "-n", "2")  # the bad row comes after these
    assert result.exit_code == 0
    assert "rows.jsonl:1\n<|im_start|>system\n" in result.output
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello ü🙂<|im_end|>⟧\n(" in result.output
    assert result.output.count("⟦") == 3 and "rows.jsonl:3" not in result.output
    assert (
        "supervised)" in result.output
        and "format prompt_completion; supervised tokens are between ⟦ and ⟧" in result.output
    )


def test_preview_in_colour(run: Run) -> None:
    result = run("preview", "-n", "1", "--color")
    assert "\x1b[32m\x1b[1mHello ü🙂<|im_end|>\x1b[0m" in result.output and "⟦" not in result.output


def test_preview_says_what_is_dropped(run: Run) -> None:
    result = run("preview", "-n", "1", "--set", "data.max_length=16")
    assert "(dropped: the first answer does not end within data.max_length; " in result.output


def test_stats(run: Run) -> None:
    result = run("stats", "--set", "data.on_bad_row=skip", "--json")
    found = json.loads(result.stdout)
    assert (found["read"], found["bad"], found["train"]["rows"], found["validation"]) == (4, 1, 4, None)
    result = run("stats", "--set", "data.on_bad_row=skip")
    assert "4 rows read (prompt_completion), 1 bad skipped" in result.output and "train: 4 rows, " in result.output
    assert "validation: none, because all 4 rows are needed for training" in result.output


@pytest.mark.parametrize("verb", ["preview", "stats"])
def test_half_a_surrogate_pair_is_named(run: Run, tmp_path: Path, verb: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi \\ud83d there", "completion": "yo"}\n' * 3)
    with pytest.raises(
        DataError,
        match=r"rows.jsonl:1: half of a surrogate pair \(\\ud83d\), which is not a character.* \(3 bad in 3 rows\)",
    ):
        run(verb)


@pytest.mark.parametrize("verb", ["preview", "stats"])
@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_rows_is_refused(run: Run, tmp_path: Path, verb: str, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"data.train \(.*rows.jsonl\) has nothing to learn: 0 rows read"):
        run(verb)


@pytest.mark.parametrize("verb", ["preview", "stats"])
def test_a_file_of_which_nothing_is_learnt_is_refused(run: Run, tmp_path: Path, verb: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "completion": ""}\n')
    with pytest.raises(
        DataError, match=r"has nothing to learn: 1 rows read, 0 bad skipped; 1 dropped: .*\n  dropped: .*rows.jsonl:1"
    ):
        run(verb)


def test_preview_names_the_columns_that_are_left_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "Hi <|im_end|>", "completion": "Hello", "id": 1, "source": "web"}\n' * 3
    )
    result = run("preview", "-n", "2")
    assert result.output.count("left out") == 1 and "left out: columns id, source (2 rows)" in result.output
    assert "special token: " in result.output and "rows.jsonl:1: its text contains '<|im_end|>'" in result.output
