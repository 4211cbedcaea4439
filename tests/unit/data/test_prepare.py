"""The prepare stage whole: splits, counts, packs on disk, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from llm_ray.conf.schema import FinetuneConf
from llm_ray.data.encode import IGNORED, ChatEncoder, Encoded
from llm_ray.data.formats import Conversation
from llm_ray.data.prepare import NO_ANSWER, TOO_LONG, DataStats, evaluation_rows, open_split, prepare, statistics
from llm_ray.errors import DataError

Make = Callable[..., FinetuneConf]
Write = Callable[..., Path]


def silent(line: str) -> None:
    pass


def qa(i: int, words: int = 3) -> dict[str, str]:
    return {"prompt": f"Question {i}?", "completion": " ".join(["answer"] * words) + f" {i}."}


def segments(out: Path, split: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each row in the packs of a split, in order."""
    found = []
    for sequence in open_split(out, split):
        assert sum(sequence["lengths"]) == len(sequence["input_ids"]) == len(sequence["labels"])
        start = 0
        for length in sequence["lengths"]:
            found.append((sequence["input_ids"][start : start + length], sequence["labels"][start : start + length]))
            start += length
    return found


def expected(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    conversations = [
        Conversation([{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]) for r in rows
    ]
    encoded = ChatEncoder(tokenizer, 4096).encode(conversations)
    return [(s.input_ids, s.labels) for e in encoded if isinstance(e, Encoded) for s in e.sequences]


def test_nothing_is_lost(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [qa(i, words=1 + i % 40) for i in range(300)]
    out = tmp_path / "prepared"
    stats = prepare(conf(jsonl(rows), validation=0.1, max_length=128), tokenizer, out, silent)
    train, validation = segments(out, "train"), segments(out, "validation")
    assert sorted(train + validation) == sorted(expected(tokenizer, rows))
    assert (len(train), len(validation)) == (stats.train.rows, stats.validation.rows if stats.validation else 0) == (270, 30)
    assert all(labels[0] == IGNORED for _, labels in train + validation)
    assert all(len(s["input_ids"]) <= 128 for s in open_split(out, "train"))
    assert stats.train.tokens == sum(len(ids) for ids, _ in train)
    assert stats.train.supervised_tokens == sum(label != IGNORED for _, labels in train for label in labels)
    assert stats.train.supervised_share == pytest.approx(stats.train.supervised_tokens / stats.train.tokens)
    assert stats.train.sequences == len(open_split(out, "train")) < 270
    assert (
        stats.train.packing_efficiency == pytest.approx(stats.train.tokens / (stats.train.sequences * 128))
        and stats.train.packing_efficiency > 0.9
    )
    assert stats.train.longest == max(len(ids) for ids, _ in train + validation if (ids, _) in train)
    assert DataStats.model_validate_json((out / "stats.json").read_text()) == stats
    assert sorted(p.name for p in out.iterdir()) == ["heldout.jsonl", "stats.json", "train", "validation"]


def test_columns_are_int32(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    prepare(conf(jsonl([qa(i) for i in range(4)])), tokenizer, tmp_path / "out", silent)
    schema = open_split(tmp_path / "out", "train").features.arrow_schema
    assert {name: str(schema.field(name).type.value_type) for name in schema.names} == dict.fromkeys(
        ("input_ids", "labels", "lengths"), "int32"
    )


def test_without_packing_a_row_is_a_sequence(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [qa(i) for i in range(20)]
    stats = prepare(conf(jsonl(rows), packing=False, validation=None), tokenizer, tmp_path / "out", silent)
    assert [len(s["lengths"]) for s in open_split(tmp_path / "out", "train")] == [1] * 20
    assert stats.validation is None
    with pytest.raises(DataError, match=r"no prepared validation data here: run the stage prepare, with data\.validation set"):
        open_split(tmp_path / "out", "validation")
    assert not (tmp_path / "out" / "heldout.jsonl").exists()
    assert segments(tmp_path / "out", "train") != expected(tokenizer, rows)  # shuffled


def test_split_is_the_seeds(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = jsonl([qa(i) for i in range(40)])
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        prepare(conf(path, validation=0.2, seed=seed), tokenizer, tmp_path / name, silent)
    one, again, other = (
        [(tmp_path / n / f).read_bytes() for f in ("train/data.arrow", "validation/data.arrow", "heldout.jsonl")]
        for n in ("one", "again", "other")
    )
    assert one == again
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_heldout_rows_are_the_validation_rows(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = jsonl([qa(i) for i in range(40)])
    made = conf(path, validation=0.2)
    prepare(made, tokenizer, tmp_path / "out", silent)
    lines = [json.loads(line) for line in (tmp_path / "out" / "heldout.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line["file"] == str(path)
        assert line["messages"][0]["content"] == f"Question {line['line'] - 1}?"
    found = list(evaluation_rows(made, tokenizer, tmp_path / "out"))
    assert [c.messages for c in found] == [line["messages"] for line in lines]
    texts = {m["content"] for line in lines for m in line["messages"]}
    learnt = [tokenizer.decode(ids) for ids, _ in segments(tmp_path / "out", "train")]
    assert not any(text in row for text in texts if text.startswith("Question") for row in learnt)


def test_validation_files_of_their_own(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    train, validation = [qa(i) for i in range(9)], [qa(i) for i in range(90, 95)]
    made = conf(jsonl(train), validation=str(jsonl(validation, "validation.jsonl")))
    stats = prepare(made, tokenizer, tmp_path / "out", silent)
    assert sorted(segments(tmp_path / "out", "train")) == sorted(expected(tokenizer, train))
    assert sorted(segments(tmp_path / "out", "validation")) == sorted(expected(tokenizer, validation))
    assert len(list(evaluation_rows(made, tokenizer, tmp_path / "out"))) == 5
    assert stats.validation and stats.validation.rows == 5 and stats.read == 14


def test_evaluation_data_of_its_own(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    questions = jsonl([{"instruction": "Who?", "context": "Ann did.", "response": "Ann"}], "questions.jsonl")
    made = conf(jsonl([qa(i) for i in range(4)]), evaluation=str(questions))
    (row,) = evaluation_rows(made, tokenizer, tmp_path / "none")
    assert [m["content"] for m in row.messages] == ["Who?\n\nAnn did.", "Ann"]


def test_rows_of_a_rewriting_template_stay_on_one_side(
    conf: Make, jsonl: Write, with_template: Callable[..., PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    turns = [{"messages": [{"role": r, "content": f"{r} {i} {n}"} for n in range(3) for r in ("user", "assistant")]} for i in range(20)]
    tokenizer = with_template("qwen3")
    stats = prepare(conf(jsonl(turns), validation=0.25, packing=False), tokenizer, tmp_path / "out", silent)
    numbers = {
        split: {tokenizer.decode(ids).split("user ")[1].split()[0] for ids, _ in segments(tmp_path / "out", split)}
        for split in ("train", "validation")
    }
    assert not numbers["train"] & numbers["validation"]
    assert (stats.train.rows, stats.train.sequences, len(numbers["train"])) == (15, 45, 15)


def test_counts(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    long = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "word " * 90},
    ]
    rows = [
        *({"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello."}]} for i in range(6)),
        {"messages": long},  # 7: truncated
        {"messages": long[2:]},  # 8: its answer does not fit
        {"messages": long[:1]},  # 9: no answer
        {"messages": [long[0], {"role": "assistant", "content": ""}]},  # 10: an empty one
        {"messages": []},  # 11: bad
    ]
    path = jsonl(rows)
    stats = prepare(conf(path, max_length=64, on_bad_row="skip", validation=None), tokenizer, tmp_path / "out", silent)
    assert (stats.read, stats.bad, stats.truncated, stats.dropped) == (10, 1, 1, {TOO_LONG: 1, NO_ANSWER: 2})
    assert stats.train.rows == 7
    assert stats.train.longest > 90
    text = "\n".join(stats.lines())
    assert f"skipped: {path}:11: 'messages' must be a list of turns" in text
    assert f"dropped: {path}:8: {TOO_LONG}" in text and f"dropped: {path}:10: {NO_ANSWER}" in text


def test_bad_row_fails_and_leaves_nothing(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = jsonl([qa(1), {"prompt": "a"}])
    with pytest.raises(DataError, match=rf"{path}:2: format prompt_completion needs 'completion'.*\(data\.on_bad_row: skip goes on"):
        prepare(conf(path), tokenizer, tmp_path / "runs" / "out", silent)
    assert list((tmp_path / "runs").iterdir()) == []


def test_row_that_the_template_refuses_is_named(conf: Make, jsonl: Write, mistral: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = jsonl([qa(1), {**qa(2), "system": "Be brief."}, qa(3)])
    with pytest.raises(DataError, match=rf"{path}:2: the chat template refuses the row: .*must alternate"):
        prepare(conf(path), mistral, tmp_path / "out", silent)
    assert prepare(conf(path, on_bad_row="skip"), mistral, tmp_path / "out", silent).bad == 1


def test_nothing_supervised_is_refused(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"(?s)data\.train .*has nothing to learn: 5 rows read.*; 5 dropped: .*raise data\.max_length \(16\).*dropped: .*:1: ",
    ):
        prepare(conf(jsonl([qa(i, words=50) for i in range(5)]), max_length=16), tokenizer, tmp_path / "out", silent)
    with pytest.raises(DataError, match="nothing to learn: 0 rows read, 2 bad skipped"):
        prepare(conf(jsonl([{}, {}]), on_bad_row="skip"), tokenizer, tmp_path / "out", silent)
    with pytest.raises(DataError, match=r"data\.validation .* has nothing to learn: 0 rows read"):
        prepare(conf(jsonl([qa(i) for i in range(6)]), validation=str(jsonl([], "none.jsonl"))), tokenizer, tmp_path / "out", silent)


def test_fraction_that_leaves_no_training_row(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation 0\.05 of 1 usable row leaves none to train on"):
        prepare(conf(jsonl([qa(1)])), tokenizer, tmp_path / "out", silent)
    assert prepare(conf(jsonl([qa(1), qa(2)])), tokenizer, tmp_path / "out", silent).train.rows == 1


def test_folder_that_cannot_be_written(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the prepared data cannot be written: Not a directory"):
        prepare(conf(jsonl([qa(1), qa(2)])), tokenizer, tmp_path / "file" / "out", silent)


def test_pretrain_text(conf: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Line {i} " + "of water " * i for i in range(1, 41)))
    made = conf(tmp_path / "book.txt", objective="pretrain", max_length=32, validation=0.1)
    stats = prepare(made, tokenizer, tmp_path / "out", silent)
    assert stats.train.rows == 36 and stats.validation and stats.validation.rows == 4 and stats.dropped == {NO_ANSWER: 39}
    rows = segments(tmp_path / "out", "train") + segments(tmp_path / "out", "validation")
    assert sum(tokenizer.eos_token_id in ids for ids, _ in rows) == 40
    assert all(labels == [IGNORED, *ids[1:]] and 2 <= len(ids) <= 32 for ids, labels in rows)
    assert list(evaluation_rows(made, tokenizer, tmp_path / "out")) == []
    assert not (tmp_path / "out" / "heldout.jsonl").exists()


def test_statistics_of_the_first_rows(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl([qa(i) for i in range(50)])
    assert statistics(conf(path), tokenizer).read == 50
    assert statistics(conf(path), tokenizer, limit=20).read == 20
    assert statistics(conf(path, max_rows=10), tokenizer, limit=20).read == 10


def test_several_files_and_formats(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    one = jsonl([qa(i) for i in range(3)])
    two = jsonl([{"instruction": "Hi", "output": "Hello"}] * 3, "two.jsonl")
    stats = statistics(conf([str(one), str(two)]), tokenizer)
    assert (stats.read, stats.formats, stats.files) == (6, ["prompt_completion", "alpaca"], [str(one), str(two)])


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.tuples(st.lists(st.integers(1, 60), min_size=2, max_size=40), st.booleans(), st.integers(0, 3)))
def test_packs_hold_the_rows(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, drawn: tuple[list[int], bool, int]
) -> None:
    words, packing, seed = drawn
    rows = [qa(i, n) for i, n in enumerate(words)]
    prepare(conf(jsonl(rows), packing=packing, seed=seed, max_length=128, validation=0.3), tokenizer, tmp_path / "out", silent)
    found = segments(tmp_path / "out", "train") + segments(tmp_path / "out", "validation")
    assert sorted(found) == sorted(expected(tokenizer, rows))


PEAK = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from llm_ray.conf.schema import FinetuneConf
from llm_ray.data.prepare import statistics
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
def peak(rows):
    data = {"train": sys.argv[2], "max_rows": rows}
    conf = FinetuneConf.model_validate({"name": "t", "model": {"base": "b"}, "data": data, "tuning": {"objective": "pretrain"}})
    tokens = statistics(conf, tokenizer).train.tokens
    return tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first, second = peak(1000), peak(10000)
print(second[0] // first[0], second[1] - first[1])
"""


def test_memory_does_not_grow_with_the_rows(smollm2: Path, tmp_path: Path) -> None:
    """Ten times the rows (7 MB of text, 14 MB of tokens and labels) for hardly more memory; mapped files count while they are read."""
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"text": f"{i} " + "the water in the lake was cold " * 22}) + "\n" for i in range(10_000))
    found = subprocess.run([sys.executable, "-c", PEAK, str(smollm2), str(path)], capture_output=True, text=True, check=True).stdout.split()
    assert int(found[0]) == 10
    assert int(found[1]) < 40_000  # KiB
