"""Files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_ray.client.prompts import Prompt, read_prompts
from llm_ray.errors import DataError

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_a_line_of_text_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("What is Ray?\n\n  \nUnd übrigens? 🙂\n")
    assert read_prompts(file) == [Prompt("What is Ray?", f"{file}:1"), Prompt("Und übrigens? 🙂", f"{file}:4")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_all_shapes(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "x"},
        {"text": "b"},
        {"instruction": "c", "output": "x"},
        {"instruction": "c", "input": "d"},
        {"instruction": "c", "input": ""},
        {"messages": TURNS},
        {"prompt": "e", "system": "Be brief."},
    ]
    file = tmp_path / f"p{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    prompts = read_prompts(file)
    assert [prompt.content for prompt in prompts] == ["a", "b", "c", "c\n\nd", "c", TURNS, "e"]
    assert prompts[6].system == "Be brief."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            '{"question": "a"}',
            "p.jsonl:2: no prompt in the row: it needs a column prompt, text, instruction or messages, but has "
            "question",
        ),
        ('{"prompt": 3}', "p.jsonl:2: 'prompt' must be non-empty text"),
        ('{"prompt": " "}', "p.jsonl:2: 'prompt' must be non-empty text"),
        ('{"instruction": "a", "input": {}}', None),
        ('{"instruction": "a", "input": [1]}', "p.jsonl:2: 'input' must be text"),
        ('{"instruction": [1], "input": "a"}', "p.jsonl:2: 'instruction' must be non-empty text"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "p.jsonl:2: 'messages' ends with an assistant's",
        ),
        ('{"prompt": "a", "prompt": "b"}', "p.jsonl:2: the key 'prompt' appears twice"),
        ('{"messages": []}', "p.jsonl:2: 'messages' must be a list of objects"),
        ('{"messages": [{"content": "a"}]}', "p.jsonl:2: 'messages' must be a list of objects"),
        ('{"prompt": "a", "system": 1}', "p.jsonl:2: 'system' must be text"),
        ('{"prompt": "a"', "p.jsonl:2: broken JSON"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path: Path, row: str, reason: str | None) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n{row}\n')
    if reason is None:
        assert len(read_prompts(file)) == 2
        return
    with pytest.raises(DataError, match=reason):
        read_prompts(file)


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "p.docx").write_text("Hi")
    for name, reason in (
        ("empty.txt", "contains no prompts"),
        ("p.docx", "unsupported file type"),
        ("none.txt", "no such file"),
        ("", "no such file"),
    ):
        with pytest.raises(DataError, match=reason):
            read_prompts(tmp_path / name)


def test_the_system_message_goes_first() -> None:
    assert Prompt("a").messages("s") == [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert Prompt("a", system="own").messages("s")[0]["content"] == "own"
    assert Prompt(TURNS).messages("s")[0] == {"role": "system", "content": "s"}
    assert Prompt([{"role": "system", "content": "own"}, *TURNS]).messages("s")[0]["content"] == "own"
    assert Prompt(TURNS).messages(None) == TURNS
