"""The prepare stage: the conf's data sets made into packed sequences on disk, split once for all workers.

    stats = prepare(conf, tokenizer, run_dir / "prepared", print)
    rows = open_split(run_dir / "prepared", "train")   # columns input_ids, labels, lengths

`prepared/` holds ``train/`` and ``validation/`` (one Arrow file each, memory-mapped when read), ``heldout.jsonl`` (the
validation rows as conversations, for the evaluation stage) and ``stats.json``. It is whole or not there.

In memory are a few numbers a row (its length and the like) and one batch of rows; the tokens go to disk in the order
of the files, and are gathered from there in the order of the seed.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from llm_ray.conf.schema import FinetuneConf
from llm_ray.data.encode import ChatEncoder, Encoded, TextEncoder
from llm_ray.data.formats import Conversation, Formatter, Text
from llm_ray.data.packing import pack
from llm_ray.data.processors import load_processor, process
from llm_ray.data.sources import Row, read
from llm_ray.errors import DataError

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation"]
Report = Callable[[str], None]

BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 22
NAMED = 5  # bad and dropped rows that are named
NO_ANSWER = "nothing to learn in it (no answer, or an empty one)"
TOO_LONG = "the first answer does not end within data.max_length"


class SplitStats(BaseModel):
    """Figures of the training or the validation data. Lengths and tokens are real ones; there is no padding."""

    rows: int
    """Rows that are learnt from (or validated on)."""
    sequences: int
    """Sequences on disk: packs, if data.packing."""
    tokens: int
    supervised_tokens: int
    supervised_share: float
    longest: int
    """Tokens of the longest row, before cutting."""
    mean: float
    """Mean tokens of a row, after cutting."""
    packing_efficiency: float
    """Share of the sequences' room (sequences × data.max_length) that holds tokens."""


class DataStats(BaseModel):
    """What prepare found and made."""

    formats: list[str]
    files: list[str]
    max_length: int
    read: int
    """Rows read and sound, those dropped included."""
    bad: int = 0
    """Rows that could not be read, and were skipped (data.on_bad_row: skip)."""
    truncated: int = 0
    """Rows whose last answers were cut, because they did not fit."""
    dropped: dict[str, int] = {}
    """Rows of which nothing is supervised, by reason."""
    examples: list[str] = []
    """The first bad and dropped rows by file and line."""
    train: SplitStats
    validation: SplitStats | None = None

    def lines(self) -> list[str]:
        """The figures for people, a line each."""
        text = [f"{self.read} rows read ({', '.join(self.formats)})" + (f", {self.bad} bad skipped" if self.bad else "")]
        text += [f"{n} rows dropped: {why}" for why, n in self.dropped.items()]
        if self.truncated:
            text.append(f"{self.truncated} rows truncated: their last answers did not fit data.max_length {self.max_length}")
        text += self.examples
        for name, split in (("train", self.train), ("validation", self.validation)):
            if split:
                text.append(
                    f"{name}: {split.rows} rows in {split.sequences} sequences ({split.packing_efficiency:.0%} full), "
                    f"{split.tokens} tokens, {split.supervised_tokens} supervised ({split.supervised_share:.0%}); "
                    f"a row has {split.mean:.0f} tokens in the mean, {split.longest} at most"
                )
        return text


@dataclass
class Tally:
    """Counts of one pass over the data."""

    fail: bool
    """Whether a bad row ends the work (data.on_bad_row: fail)."""
    read: int = 0
    bad: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    files: dict[str, None] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)
    longest: int = 0

    def on_bad_row(self, error: DataError) -> None:
        """Raise it, or count it and remember the first ones."""
        if self.fail:
            raise DataError(f"{error} (data.on_bad_row: skip goes on without such rows)") from error
        self.bad += 1
        if self.bad <= NAMED:
            self.examples.append(f"skipped: {error}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row on its way: where it came from (its columns are dropped by now), what was made of it, and its tokens."""

    row: Row
    content: Conversation | Text
    encoded: Encoded


def encode_rows(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, sources: tuple[str, ...], tally: Tally) -> Iterator[Prepared]:
    """Every sound row of `sources` with its tokens, in order, those of which nothing is left included."""
    pretrain = conf.tuning.objective == "pretrain"
    encoder = TextEncoder(tokenizer, conf.data.max_length) if pretrain else ChatEncoder(tokenizer, conf.data.max_length)
    formatter = Formatter(conf.data, pretrain=pretrain)
    tally.formats = formatter.formats
    for batch in _batches(_formatted(_processed(conf, sources, tally), formatter, tally, conf.data.max_rows)):
        if isinstance(encoder, TextEncoder):
            encodings = encoder.encode([content for _, content in batch if isinstance(content, Text)])
        else:
            encodings = encoder.encode([content for _, content in batch if isinstance(content, Conversation)])
        for (row, content), encoded in zip(batch, encodings, strict=True):
            if isinstance(encoded, DataError):
                tally.on_bad_row(DataError(f"{row.place}: {encoded}"))
                continue
            tally.read += 1
            tally.truncated += encoded.truncated and bool(encoded.sequences)
            tally.longest = max(tally.longest, encoded.longest)
            if not encoded.sequences:
                why = TOO_LONG if encoded.truncated else NO_ANSWER
                tally.dropped[why] += 1
                if tally.dropped[why] <= NAMED:
                    tokens = f" ({encoded.longest} tokens)" if encoded.truncated else ""
                    tally.examples.append(f"dropped: {row.place}: {why}{tokens}")
            yield Prepared(row, content, encoded)


def _processed(conf: FinetuneConf, sources: tuple[str, ...], tally: Tally) -> Iterator[Row]:
    rows = chain.from_iterable(read(source, tally.on_bad_row) for source in sources)
    return process(load_processor(conf.data.processor, conf.data.processor_args), rows) if conf.data.processor else rows


def _formatted(rows: Iterator[Row], formatter: Formatter, tally: Tally, most: int | None) -> Iterator[tuple[Row, Conversation | Text]]:
    sound = 0
    for row in rows:
        tally.files[row.file] = None
        try:
            content = formatter(row)
        except DataError as error:
            tally.on_bad_row(error)
            continue
        yield Row(row.file, row.line, {}), content
        sound += 1
        if sound == most:
            return


def _batches(rows: Iterator[tuple[Row, Conversation | Text]]) -> Iterator[list[tuple[Row, Conversation | Text]]]:
    """Batches that the tokenizer spreads over the cores, bounded in rows and in characters."""
    batch: list[tuple[Row, Conversation | Text]] = []
    characters = 0
    for row, content in rows:
        batch.append((row, content))
        characters += len(content.text) if isinstance(content, Text) else sum(len(m["content"]) for m in content.messages)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def prepare(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, out: Path, report: Report) -> DataStats:
    """Write the conf's data into the folder `out` (replaced if it is there), and say what was found.

    `report` is told of the progress in a line every few seconds. Raises :class:`DataError` for a bad row (unless
    data.on_bad_row is skip), for data without anything supervised, and when `out` cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stats = _prepare(conf, tokenizer, partial, report)
        (partial / "stats.json").write_text(stats.model_dump_json(indent=2))
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise DataError(f"{out}: the prepared data cannot be written: {why}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return stats


def statistics(
    conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, report: Report = lambda line: None
) -> DataStats:
    """What :func:`prepare` would find, of all rows or of the first `limit`; nothing is kept."""
    if limit:
        conf = conf.model_copy(update={"data": conf.data.model_copy(update={"max_rows": min(limit, conf.data.max_rows or limit)})})
    with tempfile.TemporaryDirectory(prefix="llm-ray-data-") as folder:
        return prepare(conf, tokenizer, Path(folder) / "prepared", report)


def open_split(out: Path, split: Split) -> datasets.Dataset:
    """The sequences of a split, memory-mapped: columns input_ids, labels and lengths, lists of int32.

    A sequence holds one or several rows one after the other; `lengths` are theirs and sum up to the sequence's. Labels
    are aligned with input_ids (no shift), -100 where nothing is supervised, which the first token of each row always is.
    """
    from datasets import Dataset

    file = out / split / "data.arrow"
    if not file.exists():
        raise DataError(f"{out}: there is no prepared {split} data here: run the stage prepare, with data.{split} set")
    return Dataset.from_file(str(file))


def evaluation_rows(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, prepared: Path) -> Iterator[Conversation]:
    """Conversations to ask the questions of: those of evaluation.data, else the validation rows; none when pretraining.

    They are ready for ``apply_chat_template(messages, tools=tools)``: tools are written out if the template knows none.
    """
    if conf.tuning.objective == "pretrain":
        return
    if conf.evaluation.data is None:
        heldout = prepared / "heldout.jsonl"
        if heldout.exists():
            with heldout.open(encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    yield Conversation(row["messages"], row["tools"])
        return
    encoder = ChatEncoder(tokenizer, conf.data.max_length)
    tally = Tally(fail=conf.data.on_bad_row == "fail")
    for _, content in _formatted(_processed(conf, conf.evaluation.data, tally), Formatter(conf.data, pretrain=False), tally, None):
        if isinstance(content, Conversation):
            yield encoder.adapt(content)


# Inside ----------------------------------------------------------------------------------------------------------------


class _Rows:
    """Encoded rows on disk in the order of the files, and a few numbers of each in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.row_of = array("q")  # of each sequence, the row it belongs to
        self.lengths = array("i")  # of each sequence
        self.supervised = array("i")  # of each sequence
        self.longest = array("i")  # of each row, before cutting
        self.count = 0

    def write(self, rows: Iterator[Prepared], adapt: Callable[[Conversation], Conversation] | None) -> None:
        """Write all rows that have sequences; with `adapt`, their conversations too, as JSON in the first sequence's column."""
        import pyarrow as pa

        tokens = pa.list_(pa.int32())
        schema = pa.schema({"input_ids": tokens, "labels": tokens, "conversation": pa.large_string()})
        with pa.OSFile(str(self.file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            columns: dict[str, list[Any]] = {name: [] for name in schema.names}
            size = 0
            for prepared in rows:
                for number, sequence in enumerate(prepared.encoded.sequences):
                    self.row_of.append(self.count)
                    self.lengths.append(len(sequence.input_ids))
                    self.supervised.append(sum(label >= 0 for label in sequence.labels))
                    columns["input_ids"].append(sequence.input_ids)
                    columns["labels"].append(sequence.labels)
                    columns["conversation"].append(_heldout_line(prepared, adapt) if adapt and not number else "")
                    size += len(sequence.input_ids)
                if prepared.encoded.sequences:
                    self.longest.append(prepared.encoded.longest)
                    self.count += 1
                if size > 1 << 18:
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    columns, size = {name: [] for name in schema.names}, 0
            if size:
                writer.write_batch(pa.record_batch(columns, schema=schema))

    def table(self) -> datasets.Dataset:
        from datasets import Dataset

        return Dataset.from_file(str(self.file)).with_format("arrow")


def _heldout_line(prepared: Prepared, adapt: Callable[[Conversation], Conversation]) -> str:
    if isinstance(prepared.content, Text):
        return ""
    conversation = adapt(prepared.content)
    line = {"messages": conversation.messages, "tools": conversation.tools, "file": prepared.row.file, "line": prepared.row.line}
    return json.dumps(line, ensure_ascii=False)


def _prepare(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, folder: Path, report: Report) -> DataStats:
    import numpy as np

    tallies: list[Tally] = []
    adapt = ChatEncoder(tokenizer, conf.data.max_length).adapt if conf.tuning.objective == "sft" else None

    def written(sources: tuple[str, ...], name: str, keep: bool) -> _Rows:
        rows, tally = _Rows(folder / f"{name}.rows.arrow"), Tally(fail=conf.data.on_bad_row == "fail")
        tallies.append(tally)
        rows.write(_reported(encode_rows(conf, tokenizer, sources, tally), tally, report), adapt if keep else None)
        _refuse_nothing(conf, f"data.{name}", sources, rows, tally)
        return rows

    fraction = conf.data.validation if isinstance(conf.data.validation, float) else None
    train = written(conf.data.train, "train", keep=fraction is not None)
    rank = np.random.default_rng(conf.training.seed).permutation(train.count)  # of each row, its place in the order of the seed
    held = 0
    if fraction is not None:
        held = max(1, round(fraction * train.count))
        if held >= train.count:
            raise DataError(
                f"data.validation {fraction} of {train.count} usable row{'s' * (train.count != 1)} leaves none to train on: add rows, "
                "or set data.validation: null"
            )
    sequences = np.argsort(rank[np.array(train.row_of)], kind="stable")
    is_held = rank[np.array(train.row_of)][sequences] < held
    stats: dict[Split, SplitStats] = {}
    if held:
        stats["validation"] = _write_split(conf, train, sequences[is_held], folder / "validation", report)
        _write_heldout(train, sequences[is_held], folder / "heldout.jsonl")
    elif isinstance(conf.data.validation, tuple):
        validation = written(conf.data.validation, "validation", keep=True)
        order = np.arange(len(validation.row_of))
        stats["validation"] = _write_split(conf, validation, order, folder / "validation", report)
        _write_heldout(validation, order, folder / "heldout.jsonl")
        validation.file.unlink()
    stats["train"] = _write_split(conf, train, sequences[~is_held], folder / "train", report)
    train.file.unlink()
    return DataStats(
        formats=list(dict.fromkeys(form for tally in tallies for form in tally.formats)),
        files=list(dict.fromkeys(file for tally in tallies for file in tally.files)),
        max_length=conf.data.max_length,
        read=sum(tally.read for tally in tallies),
        bad=sum(tally.bad for tally in tallies),
        truncated=sum(tally.truncated for tally in tallies),
        dropped=dict(sum((tally.dropped for tally in tallies), Counter[str]())),
        examples=[example for tally in tallies for example in tally.examples],
        train=stats["train"],
        validation=stats.get("validation"),
    )


def _reported(rows: Iterator[Prepared], tally: Tally, report: Report) -> Iterator[Prepared]:
    last = time.monotonic()
    for prepared in rows:
        yield prepared
        if time.monotonic() - last > 2:
            last = time.monotonic()
            report(f"prepare: {tally.read} rows read, at {prepared.row.place}")


def _refuse_nothing(conf: FinetuneConf, key: str, sources: tuple[str, ...], rows: _Rows, tally: Tally) -> None:
    """A loss over no token is 0.0 and looks like success."""
    if any(rows.supervised):
        return
    found = f"{tally.read} rows read, {tally.bad} bad skipped"
    reasons = "".join(f"; {n} dropped: {why}" for why, n in tally.dropped.items())
    long = tally.dropped[TOO_LONG]
    advice = f"; the longest row has {tally.longest} tokens: raise data.max_length ({conf.data.max_length})" if long else ""
    examples = "".join(f"\n  {example}" for example in tally.examples)
    raise DataError(f"{key} ({', '.join(sources)}) has nothing to learn: {found}{reasons}{advice}{examples}")


def _write_heldout(rows: _Rows, sequences: np.ndarray, file: Path) -> None:
    table = rows.table().select_columns(["conversation"])
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, len(sequences), 1024):
            lines = table[sequences[start : start + 1024].tolist()]["conversation"].to_pylist()
            out.writelines(line + "\n" for line in lines if line)
    if not file.stat().st_size:
        file.unlink()


def _write_split(conf: FinetuneConf, rows: _Rows, sequences: np.ndarray, folder: Path, report: Report) -> SplitStats:
    """Pack the sequences (numbers into `rows`, in order) and write them to ``folder/data.arrow``."""
    import numpy as np
    import pyarrow as pa

    folder.mkdir()
    lengths = np.array(rows.lengths)[sequences]
    rng = np.random.default_rng(conf.training.seed)
    packs = pack(lengths, conf.data.max_length, rng) if conf.data.packing else ([i] for i in range(len(sequences)))
    tokens = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": tokens, "labels": tokens, "lengths": tokens})
    table, count, last = rows.table().select_columns(["input_ids", "labels"]), 0, time.monotonic()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for group in _groups(packs, max(1, (1 << 18) // conf.data.max_length)):
            members = np.concatenate(group)
            gathered = table[sequences[members].tolist()]
            ends = np.cumsum([len(p) for p in group])  # of each pack, among the sequences
            starts = np.concatenate([[0], ends]).astype(np.int32)
            offsets = np.concatenate([[0], np.cumsum(lengths[members])])[starts].astype(np.int32)
            columns = [pa.ListArray.from_arrays(offsets, gathered[name].combine_chunks().flatten()) for name in ("input_ids", "labels")]
            columns.append(pa.ListArray.from_arrays(starts, lengths[members].astype(np.int32)))
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += len(group)
            if time.monotonic() - last > 2:
                last = time.monotonic()
                report(f"prepare: {count} sequences of {folder.name} written")
    used = np.unique(np.array(rows.row_of)[sequences])
    total, supervised = int(lengths.sum()), int(np.array(rows.supervised)[sequences].sum())
    return SplitStats(
        rows=len(used),
        sequences=count,
        tokens=total,
        supervised_tokens=supervised,
        supervised_share=supervised / total,
        longest=int(np.array(rows.longest)[used].max()),
        mean=total / len(used),
        packing_efficiency=total / (count * conf.data.max_length),
    )


def _groups(packs: Iterator[list[int]], size: int) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for one in packs:
        group.append(one)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
