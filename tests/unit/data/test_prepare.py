"""The whole prepare stage: splits, counts, tokens on disk, and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.encode import IGNORED, NO_ANSWER, TOO_LONG, ChatEncoder, Encoded
from llm_ray.data.formats import Conversation
from llm_ray.data.prepare import (
    DataStats,
    asked_in_training,
    evaluated_split,
    evaluation_rows,
    lengths_of,
    open_split,
    prepare,
    questions_from,
    statistics,
)
from llm_ray.errors import DataError
from tests.unit.data.turns import silent

Make = Callable[..., FinetuneConf]
Write = Callable[..., Path]


def qa(i: int, words: int = 3) -> dict[str, str]:
    return {"prompt": f"Question {i}?", "completion": " ".join(["answer"] * words) + f" {i}."}


def segments(out: Path, split: Any) -> list[tuple[list[int], list[int]]]:
    """Returns tokens and labels of each sequence of a split, in order."""
    return [(sequence["input_ids"], sequence["labels"]) for sequence in open_split(out, split)]


def expected(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    conversations = [
        Conversation([{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}])
        for r in rows
    ]
    encoded = ChatEncoder(tokenizer, 4096).encode(conversations)
    return [(s.input_ids, s.labels) for e in encoded if isinstance(e, Encoded) for s in e.sequences]


def test_nothing_is_lost(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [qa(i, words=1 + i % 40) for i in range(300)]
    out = tmp_path / "prepared"
    stats = prepare(conf(jsonl(rows), validation=0.1, max_length=128), tokenizer, out, silent)
    train, validation = segments(out, "train"), segments(out, "validation")
    assert sorted(train + validation) == sorted(expected(tokenizer, rows))
    assert (
        (len(train), len(validation))
        == (stats.train.rows, stats.validation.rows if stats.validation else 0)
        == (270, 30)
    )
    assert all(labels[0] == IGNORED for _, labels in train + validation)
    assert all(len(s["input_ids"]) <= 128 for s in open_split(out, "train"))
    assert stats.train.tokens == sum(len(ids) for ids, _ in train)
    assert stats.train.supervised_tokens == sum(label != IGNORED for _, labels in train for label in labels)
    assert stats.train.supervised_share == pytest.approx(stats.train.supervised_tokens / stats.train.tokens)
    assert stats.train.sequences == len(open_split(out, "train")) == 270
    assert list(lengths_of(open_split(out, "train"))) == [len(ids) for ids, _ in train]
    assert stats.train.longest == max(len(ids) for ids, _ in train + validation if (ids, _) in train)
    assert DataStats.model_validate_json((out / "stats.json").read_text()) == stats
    assert sorted(p.name for p in out.iterdir()) == [
        "heldout.jsonl",
        "questions.npy",
        "stats.json",
        "train",
        "validation",
    ]


@pytest.mark.parametrize("template", [None, "qwen3"])
def test_tables_teach_the_tokens_that_json_lines_teach(
    conf: Make,
    jsonl: Write,
    tokenizer: PreTrainedTokenizerBase,
    with_template: Callable[..., PreTrainedTokenizerBase],
    template: str | None,
    tmp_path: Path,
) -> None:
    """Calls and tools of several functions: in a table, each has the others' fields, filled with nulls."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": "dim",
                "description": "dims",
                "parameters": {"type": "object", "properties": {"level": {"type": "integer"}}},
            },
        },
        {
            "type": "function",
            "function": {
                "name": "wake",
                "description": "wakes",
                "parameters": {"type": "object", "properties": {"at": {"minimum": 0}}},
            },
        },
    ]

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "messages": [
                {"role": "user", "content": "Do it."},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "done", "tool_call_id": "c1"},
                {"role": "assistant", "content": "Done."},
            ],
            "tools": tools,
        }

    rows = [
        row("dim", {"level": 2, "where": {"room": "hall"}}),
        row("wake", {"where": {"floor": 1}, "at": 6}),
        row("dim", {"level": 0}),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(str(tmp_path / "saved"))
    tokenizer = with_template(template) if template else tokenizer
    found = []
    for source in (jsonl(rows), tmp_path / "rows.parquet", tmp_path / "saved"):
        prepare(conf(source, packing=False), tokenizer, tmp_path / "out", silent)
        found.append(segments(tmp_path / "out", "train"))
    assert found[0] == found[1] == found[2]
    assert "null" not in tokenizer.decode([i for ids, _ in found[0] for i in ids])


def test_columns_are_int32(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    prepare(conf(jsonl([qa(i) for i in range(4)])), tokenizer, tmp_path / "out", silent)
    schema = open_split(tmp_path / "out", "train").features.arrow_schema
    assert {name: str(schema.field(name).type.value_type) for name in schema.names} == dict.fromkeys(
        ("input_ids", "labels"), "int32"
    )


def test_without_validation_all_rows_are_learned_shuffled(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [qa(i) for i in range(20)]
    stats = prepare(conf(jsonl(rows), validation=None), tokenizer, tmp_path / "out", silent)
    assert stats.validation is None
    with pytest.raises(
        DataError, match=r"no prepared validation data: run the stage prepare with data\.validation set"
    ):
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


def test_heldout_rows_are_the_validation_rows(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
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


def test_validation_files_of_their_own(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train, validation = [qa(i) for i in range(9)], [qa(i) for i in range(90, 95)]
    made = conf(jsonl(train), validation=str(jsonl(validation, "validation.jsonl")))
    stats = prepare(made, tokenizer, tmp_path / "out", silent)
    assert sorted(segments(tmp_path / "out", "train")) == sorted(expected(tokenizer, train))
    assert sorted(segments(tmp_path / "out", "validation")) == sorted(expected(tokenizer, validation))
    assert len(list(evaluation_rows(made, tokenizer, tmp_path / "out"))) == 5
    assert stats.validation and stats.validation.rows == 5 and stats.read == 14


def test_test_rows_are_seen_by_neither_training_nor_validation(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [qa(i) for i in range(20)]
    path = jsonl(rows)
    made = conf(path, validation=0.2, test=0.1)
    stats = prepare(made, tokenizer, tmp_path / "out", silent)
    parts = {split: segments(tmp_path / "out", split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 14, "validation": 4, "test": 2}
    assert sorted(row for part in parts.values() for row in part) == sorted(expected(tokenizer, rows))
    assert stats.test and stats.test.rows == 2 and any(line.startswith("test: 2 rows") for line in stats.lines())
    asked = list(evaluation_rows(made, tokenizer, tmp_path / "out"))
    assert len(asked) == 2 and questions_from(made, tmp_path / "out") == "test rows"
    assert evaluated_split(tmp_path / "out") == "test"
    # The validation rows are the same as without a test split.
    prepare(conf(path, validation=0.2), tokenizer, tmp_path / "without", silent)
    assert segments(tmp_path / "without", "validation") == parts["validation"]
    assert evaluated_split(tmp_path / "without") == "validation"


def test_test_rows_beside_validation_files(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    held = jsonl([qa(i) for i in range(90, 95)], "validation.jsonl")
    made = conf(jsonl([qa(i) for i in range(10)]), validation=str(held), test=0.2)
    stats = prepare(made, tokenizer, tmp_path / "out", silent)
    assert [split and split.rows for split in (stats.train, stats.validation, stats.test)] == [8, 5, 2]
    assert len(list(evaluation_rows(made, tokenizer, tmp_path / "out"))) == 2
    with pytest.raises(DataError, match=r"data\.test 0\.9 and data\.validation leave none of 10 usable rows"):
        prepare(conf(jsonl([qa(i) for i in range(10)]), validation=0.2, test=0.9), tokenizer, tmp_path / "x", silent)


def test_evaluation_data_of_its_own(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    questions = jsonl([{"instruction": "Who?", "context": "Ann did.", "response": "Ann"}], "questions.jsonl")
    made = conf(jsonl([qa(i) for i in range(4)]), evaluation=str(questions))
    (row,) = evaluation_rows(made, tokenizer, tmp_path / "none")
    assert [m["content"] for m in row.messages] == ["Who?\n\nAnn did.", "Ann"]


def test_rows_of_a_rewriting_template_stay_on_one_side(
    conf: Make, jsonl: Write, with_template: Callable[..., PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    turns = [
        {"messages": [{"role": r, "content": f"{r} {i} {n}"} for n in range(3) for r in ("user", "assistant")]}
        for i in range(20)
    ]
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
        *(
            {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello."}]}
            for i in range(6)
        ),
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


def test_bad_row_fails_and_leaves_nothing(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = jsonl([qa(1), {"prompt": "a"}])
    with pytest.raises(
        DataError, match=rf"{path}:2: format prompt_completion needs 'completion'.* \(1 bad in 2 rows\)"
    ):
        prepare(conf(path), tokenizer, tmp_path / "runs" / "out", silent)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "count", "told"),
    [
        ({"prompt": "a"}, 1, r"\(data\.on_bad_row: skip ignores such rows, 1 bad in 20 rows\)"),
        ({"prompt": "a"}, 2, r"\(data\.on_bad_row: skip ignores such rows, 2 bad in 20 rows\)"),
        ({"prompt": "a"}, 3, r" \(3 bad in 20 rows\)"),
        ("no row", 20, r" \(20 bad in 20 rows\)"),
        ({**qa(1), "system": "Be brief."}, 3, r" \(3 bad in 20 rows\)"),
    ],
)
def test_skipping_is_advised_only_where_nearly_all_rows_are_kept(
    conf: Make, jsonl: Write, mistral: PreTrainedTokenizerBase, tmp_path: Path, bad: object, count: int, told: str
) -> None:
    rows: list[object] = [qa(i) for i in range(20)]
    rows[20 - count :] = [bad] * count
    with pytest.raises(DataError, match=rf":{21 - count}: .*{told}$"):
        prepare(conf(jsonl(rows)), mistral, tmp_path / "out", silent)


def test_a_bad_row_is_told_soon_whatever_follows(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = jsonl([{"prompt": "a"}, *(qa(i) for i in range(3000))])
    with pytest.raises(DataError, match=r":1: .*, 1 bad in 1000 rows so far\)"):
        statistics(conf(path), tokenizer)
    with pytest.raises(DataError, match=r":1: .*, 1 bad in 1000 rows so far\)"):
        statistics(conf(path), tokenizer, limit=2)
    (tmp_path / "rows.json").write_text('[{"prompt": "a"}, {"prompt": ')
    with pytest.raises(DataError, match=r":1 \(element 1\): format|:1 \(element 1\): cannot detect the format"):
        statistics(conf(tmp_path / "rows.json"), tokenizer)


def test_row_that_the_template_refuses_is_named(
    conf: Make, jsonl: Write, mistral: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = jsonl([qa(1), {**qa(2), "system": "Be brief."}, qa(3)])
    with pytest.raises(DataError, match=rf"{path}:2: the chat template rejects the row: .*must alternate"):
        prepare(conf(path), mistral, tmp_path / "out", silent)
    assert prepare(conf(path, on_bad_row="skip"), mistral, tmp_path / "out", silent).bad == 1


def test_nothing_supervised_is_refused(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError,
        match=r"(?s)data\.train .*has nothing to learn: 5 rows read.*; 5 dropped: .*raise data\.max_length \(16\).*dropped: .*:1: ",
    ):
        prepare(conf(jsonl([qa(i, words=50) for i in range(5)]), max_length=16), tokenizer, tmp_path / "out", silent)
    with pytest.raises(DataError, match="nothing to learn: 0 rows read, 2 bad skipped"):
        prepare(conf(jsonl([{}, {}]), on_bad_row="skip"), tokenizer, tmp_path / "out", silent)
    with pytest.raises(DataError, match=r"data\.validation .* has nothing to learn: 0 rows read"):
        prepare(
            conf(jsonl([qa(i) for i in range(6)]), validation=str(jsonl([], "none.jsonl"))),
            tokenizer,
            tmp_path / "out",
            silent,
        )


def test_fraction_that_leaves_no_training_row(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.validation 0\.05 of 1 usable row leaves none to train on"):
        prepare(conf(jsonl([qa(1)]), validation=0.05), tokenizer, tmp_path / "out", silent)
    assert prepare(conf(jsonl([qa(1), qa(2)]), validation=0.05), tokenizer, tmp_path / "out", silent).train.rows == 1


def test_folder_that_cannot_be_written(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the prepared data cannot be written: Not a directory"):
        prepare(conf(jsonl([qa(1), qa(2)])), tokenizer, tmp_path / "file" / "out", silent)


def test_pretrain_text(conf: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Line {i} " + "of water " * i for i in range(1, 41)))
    made = conf(tmp_path / "book.txt", objective="pretrain", max_length=32, validation=0.1)
    stats = prepare(made, tokenizer, tmp_path / "out", silent)
    assert (
        stats.train.rows == 36 and stats.validation and stats.validation.rows == 4 and stats.dropped == {NO_ANSWER: 39}
    )
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


def test_means_and_maxima_are_of_the_same(
    conf: Make,
    jsonl: Write,
    with_template: Callable[..., PreTrainedTokenizerBase],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """With a template that drops earlier reasoning, a row has several sequences; long rows are cut; texts are split."""
    turns = [
        {"role": r, "content": f"<think>\n{n}\n</think>\nA" if r == "assistant" else "Q"}
        for n in "123"
        for r in ("user", "assistant")
    ]
    stats = prepare(
        conf(jsonl([{"messages": turns}, {"messages": turns[:2]}])), with_template("qwen3"), tmp_path / "out", silent
    )
    lengths = lengths_of(open_split(tmp_path / "out", "train"))
    assert len(lengths) == 4 and stats.train.mean > stats.train.longest
    assert f"a sequence has {lengths.mean():.0f} tokens on average, {max(lengths)} at most" in "\n".join(stats.lines())
    cut = [{"messages": [*turns[:2], turns[0], {"role": "assistant", "content": "word " * 90}]}] * 2
    lines = "\n".join((stats := statistics(conf(jsonl(cut), max_length=64), tokenizer)).lines())
    assert f"a row has {stats.train.mean:.0f} tokens on average, {stats.train.mean:.0f} at most" in lines
    assert (
        f"did not fit data.max_length 64; the longest row needs {stats.train.longest}" in lines
        and stats.train.longest > 90
    )
    (tmp_path / "book.txt").write_text("word " * 100)
    lines = "\n".join(statistics(conf(tmp_path / "book.txt", objective="pretrain", max_length=64), tokenizer).lines())
    assert (
        "train: 1 rows in 2 sequences, 102 tokens" in lines
        and "; a sequence has 51 tokens on average, 64 at most" in lines
    )


def test_several_files_and_formats(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    one = jsonl([qa(i) for i in range(3)])
    two = jsonl([{"instruction": "Hi", "output": "Hello"}] * 3, "two.jsonl")
    stats = statistics(conf([str(one), str(two)]), tokenizer)
    assert (stats.read, stats.formats, stats.files) == (6, ["prompt_completion", "alpaca"], [str(one), str(two)])


def test_small_sets_keep_no_rows_back_and_larger_ones_a_tenth(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    small = statistics(conf(jsonl([qa(i) for i in range(199)])), tokenizer)
    assert small.train.rows == 199 and small.validation is None
    assert "validation: none, because all 199 rows are needed for training" in "\n".join(small.lines())
    large = statistics(conf(jsonl([qa(i) for i in range(200)])), tokenizer)
    assert large.train.rows == 180 and large.validation and large.validation.rows == 20


def test_rows_that_repeat_or_contradict_each_other_are_counted(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [qa(1), qa(2), {**qa(1), "prompt": "question  1?"}, {**qa(2), "completion": "Another."}, qa(3)]
    path = jsonl(rows)
    stats = statistics(conf(path), tokenizer)
    assert (stats.repeated, stats.contradicting, stats.leaked) == (1, 1, 0)
    assert stats.answers == 4, "different ones"
    assert f"contradicting: {path}:4 and {path}:2 ask the same question and answer it differently" in stats.examples


def test_validation_rows_that_are_trained_on_are_counted(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    held = jsonl([qa(2), qa(7), {**qa(3), "completion": "In other words."}], "held.jsonl")
    made = conf(jsonl([qa(i) for i in range(5)]), validation=str(held), evaluation=str(held))
    assert prepare(made, tokenizer, tmp_path / "out", silent).leaked == 2
    assert asked_in_training(tmp_path / "out", evaluation_rows(made, tokenizer, tmp_path / "out")) == 2


def test_special_tokens_in_texts_are_counted_escaped_or_refused(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = jsonl([*(qa(i) for i in range(18)), {"prompt": "What is <|im_end|>?", "completion": "An end."}])
    stats = statistics(conf(path), tokenizer)
    lines = "\n".join(stats.lines())
    assert (
        stats.special_tokens == 1
        and "rows whose text contains special tokens of the model: 1 (data.special_tokens_in_text)" in lines
    )
    assert (
        f"special token: {path}:19: its text contains '<|im_end|>', a special token of the model: it is treated as "
        "one" in lines
    )
    with pytest.raises(
        DataError, match=r":19: its text contains '<\|im_end\|>'.*skip ignores such rows, 1 bad in 19 rows"
    ):
        statistics(conf(path, special_tokens_in_text="fail"), tokenizer)
    assert statistics(conf(path, special_tokens_in_text="fail", on_bad_row="skip"), tokenizer).bad == 1
    made = conf(path, special_tokens_in_text="escape", validation=None)
    escaped = prepare(made, tokenizer, tmp_path / "out", silent)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = [ids for ids, _ in segments(tmp_path / "out", "train") if "What is" in tokenizer.decode(ids)]
    assert found[0].count(end) == 3 and escaped.special_tokens == 1 and escaped.train.tokens > stats.train.tokens
    (asked,) = [c for c in evaluation_rows(made, tokenizer, tmp_path / "out") if "What is" in c.messages[0]["content"]]
    assert asked.messages[0]["content"] == "What is <|im_end|>?"  # as clients send it


def test_files_named_like_a_test_set_are_named_before_they_are_trained_on(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl", "my-validation_2.jsonl", "contest.jsonl"):
        jsonl([qa(1), qa(2)], f"set/{name}")
    stats = statistics(conf(folder), tokenizer)
    assert (
        len(stats.notes) == 1
        and f"{folder}/my-validation_2.jsonl, {folder}/test.jsonl; to avoid that" in stats.notes[0]
    )
    assert stats.notes[0] in stats.lines()
    assert statistics(conf(folder / "test.jsonl"), tokenizer).notes == []
    for name in ("train.jsonl", "contest.jsonl"):
        (folder / name).unlink()
    assert statistics(conf(folder), tokenizer).notes == []  # nothing else is there


def test_columns_that_are_not_used_are_listed_once(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {**qa(i), "id": i, "source": "web", "note": None if i % 3 else "x", "images": [], "image": "cat.png"}
        for i in range(9)
    ]
    stats = statistics(conf(jsonl(rows)), tokenizer)
    assert stats.left_out == {"id": 9, "image": 9, "source": 9, "note": 3}
    assert [line for line in stats.lines() if "left out" in line] == [
        "left out: columns id, image, source (9 rows); note (3 rows)"
    ]
    assert statistics(conf(jsonl([qa(i) for i in range(3)])), tokenizer).left_out == {}
    texts = [{"text": f"Text {i}.", "url": "http://localhost"} for i in range(3)]
    assert statistics(conf(jsonl(texts), objective="pretrain"), tokenizer).left_out == {"url": 3}


PEAK = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from llm_ray.conf.finetune import FinetuneConf
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
    """Ten times the rows (7 MB of text, 14 MB of tokens and labels) need hardly more memory. Mapped files count while they
    are read."""
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        file.writelines(
            json.dumps({"text": f"{i} " + "the water in the lake was cold " * 22}) + "\n" for i in range(10_000)
        )
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(smollm2), str(path)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(found[0]) == 10
    assert int(found[1]) < 40_000  # KiB
