"""What of an answer becomes rows, which rows are kept, and the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_ray.documents.log import key_of, open_log
from llm_ray.documents.passages import Passage
from llm_ray.documents.repeats import repeats
from llm_ray.documents.rows import read_answer
from llm_ray.documents.support import support
from llm_ray.errors import ConfError

PASSAGE = Passage("a.md", "Pumps", ("Pumps", "Parts"), "A pump has a rotor and 2 seals of rubber.", 3, 4, False)
ROW = {"question": "What has a pump?", "answer": "A rotor."}


@pytest.mark.parametrize(
    ("text", "rows", "cut", "empty", "form"),
    [
        (json.dumps({"rows": [ROW, ROW]}), 2, 0, 0, True),
        ("```json\n" + json.dumps({"rows": [ROW]}) + "\n```", 1, 0, 0, True),
        (json.dumps({"rows": [ROW] * 5}), 3, 0, 0, True),
        (json.dumps({"rows": [ROW, ROW]})[:-12], 1, 1, 0, True),
        (json.dumps({"rows": [ROW, {"question": " ", "answer": "A"}]}), 1, 0, 1, True),
        (json.dumps({"rows": [{"question": "Q", "answer": 3}, "text"]}), 0, 2, 0, True),
        ('{"rows": []}', 0, 0, 0, True),
        *((text, 0, 0, 0, False) for text in ("", "No.", "[]", "{", '{"rows": 3}', '{"row": []}', "{not json}")),
    ],
)
def test_rows_of_an_answer(text: str, rows: int, cut: int, empty: int, form: bool) -> None:
    found = read_answer(text, PASSAGE, 3)
    assert (len(found.rows), found.cut, found.empty, found.form) == (rows, cut, empty, form)


def test_a_row_says_where_it_is_from() -> None:
    row = read_answer(json.dumps({"rows": [ROW]}), PASSAGE, 3).rows[0].values("m")
    assert row == {
        "messages": [{"role": "user", "content": ROW["question"]}, {"role": "assistant", "content": ROW["answer"]}],
        "source": {"file": "a.md", "lines": [3, 4], "heading": ["Pumps", "Parts"], "passage": PASSAGE.text},
        "written_by": "m",
    }


@pytest.mark.parametrize(
    ("answer", "passage", "share"),
    [
        ("The pump has seals.", "Pumps have 2 seals.", 1),
        ("The pump has 2 seals.", "Pumps have 2 seals.", 1),
        ("The pump has 3 seals.", "Pumps have 2 seals.", 0),
        ("Penguins like seals.", "Pumps have 2 seals.", 1 / 3),
        ("Yes.", "Pumps have 2 seals.", 0),
        ("8 GB", "It needs 8 GB.", 1),
        ("水泵有转子", "水泵有转子和密封", 1),
        ("水泵有电机", "水泵有转子和密封", 3 / 5),
        ("!!!", "Pumps have 2 seals.", 0),
    ],
)
def test_support(answer: str, passage: str, share: float) -> None:
    assert support(answer, passage) == pytest.approx(share)


def test_repeats() -> None:
    long = "The pump of the lower station moves water from the well to the tank at night"
    assert repeats(
        [
            ("What is a pump?", "A machine that moves water."),
            ("what is  a PUMP", "Something else entirely, which does not matter here."),
            ("What is a motor?", "A machine that moves a pump."),
            ("What does the pump of the lower station do?", f"{long}."),
            ("What does the pump of the lower station move?", f"{long}."),
            ("What is the default of --top-k?", "It is 5."),
            ("What is the default of --top-p?", "It is 0.9."),
        ]
    ) == ["", "exact", "", "", "near", "", ""]


def test_repeats_are_those_of_a_comparison_of_all_with_all() -> None:
    import random

    from llm_ray.documents.repeats import NEAR

    random.seed(3)
    rows = [(str(n), " ".join(random.choices("abcdefghijkl", k=random.randint(1, 12)))) for n in range(300)]
    sets = [{*question.split(), *answer.split()} for question, answer in rows]
    kept: list[set[str]] = []
    expected = []
    for one in sets:
        near = any(len(one & other) >= NEAR * len(one | other) for other in kept)
        expected.append("near" if near else "")
        kept += [] if near else [one]
    assert repeats(rows) == expected and "near" in expected


# The log --------------------------------------------------------------------------------------------------------------


def test_the_log_remembers_and_repairs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.answers"
    with open_log(path) as log:
        log.keep(key_of({"a": 1}), "eins \ud83d", place="a.md:1")
        log.keep(key_of({"a": 2}), "zwei")
    path.write_bytes(path.read_bytes()[:-5])  # killed while it wrote
    with open_log(path) as log:
        assert log.answers == {key_of({"a": 1}): "eins \ud83d"}
        log.keep(key_of({"a": 3}), "drei")
    with open_log(path) as log:
        assert set(log.answers) == {key_of({"a": 1}), key_of({"a": 3})}
        with pytest.raises(ConfError, match="another process"), open_log(path):
            pass


def test_only_its_own_files_are_replaced(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with open_log(tmp_path / "log") as log:
        log.check(rows)
        log.write(rows, [{"a": 1}])
    with open_log(tmp_path / "log") as log:
        log.check(rows)
        rows.write_text('{"a": 2}\n')
        with pytest.raises(ConfError, match="changed since"):
            log.check(rows)


def test_a_foreign_file_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"a": 1}\n{"b"')
    with pytest.raises(ConfError, match="log:1 is not a line"), open_log(tmp_path / "log"):
        pass
    assert (tmp_path / "log").read_text() == '{"a": 1}\n{"b"'
