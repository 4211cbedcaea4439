"""The prepare stage: converts the conf's data sets to tokens on disk, and splits them once for all workers.

    stats = prepare(conf, tokenizer, run_dir / "prepared", print)
    rows = open_split(run_dir / "prepared", "train")   # columns input_ids, labels

`prepared/` contains ``train/``, ``validation/`` and ``test/`` (one Arrow file each, read memory-mapped);
``heldout.jsonl``, the test rows, else the validation rows, as conversations for the evaluation stage (if there are
none, ``trained.jsonl`` with some of the training rows); ``questions.npy``, hashes of the training rows' questions; and
``stats.json``. The folder is created atomically.

Memory holds a few numbers per row, such as its length, and one batch of rows: tokens are first written in the order of
the files, and then gathered in the order given by the seed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.objectives import Reads
from llm_ray.data.encode import (
    PAIR_TOO_LONG,
    RATED_TOO_LONG,
    TOO_LONG,
    ChatEncoder,
    Encoded,
    SpecialTokens,
    encoder_for,
)
from llm_ray.data.formats import Content, Conversation, Formatter, Pair, Rated, Text
from llm_ray.data.processors import load_processor, process
from llm_ray.data.sources import Row, named_to_test, place, read
from llm_ray.errors import DataError
from llm_ray.models.chat import Message, text_of

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
Report = Callable[[str], None]
Batch = list[tuple[Row, Content]]

BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 22
LOOKED_AT = 1000  # rows to read before a bad one is reported, to count how many are bad
FEW = 10  # if at most one row in so many is bad, the error suggests to skip bad rows
NAMED = 5  # number of bad, dropped and contradicting rows listed as examples
VALIDATION_FROM = 200  # minimum rows for data.validation: auto to hold some out,
VALIDATION_SHARE = 0.1  # what fraction,
VALIDATION_ROWS = 500  # and the maximum
QUESTIONS = "questions.npy"
HELDOUT, TRAINED = "heldout.jsonl", "trained.jsonl"
TRAINED_ROWS = 100  # training rows for evaluation if none are held out
COLUMNS: Mapping[str, tuple[str, ...]] = {"pairs": ("chosen",), "ratings": ("good", "prompt")}
"""Columns of prepared sequences besides tokens and labels, by what the objective reads."""
FORM = 4
"""Version of the format of prepared data; data of another version are prepared again."""


class SplitStats(BaseModel):
    """Figures of one split. Lengths and tokens do not include padding."""

    rows: int
    """Rows with something supervised."""
    sequences: int
    """Sequences on disk, of which epochs consist: long texts have several, as do conversations with some chat
    templates."""
    tokens: int
    supervised_tokens: int
    supervised_share: float
    longest: int
    """Tokens of the longest row before cutting: the data.max_length that it needs."""
    longest_sequence: int
    """Tokens of the longest sequence on disk."""
    mean: float
    """Mean tokens per row, over all of its sequences, after cutting."""
    answer: float
    """Mean supervised tokens per row."""
    good: int | None = None
    """Sequences whose answer is rated good, the others being rated bad; None if answers are not rated."""


class DataStats(BaseModel):
    """Figures of the prepared data."""

    formats: list[str]
    files: list[str]
    max_length: int
    read: int
    """Valid rows, including those dropped."""
    bad: int = 0
    """Invalid rows, which were skipped (data.on_bad_row: skip)."""
    truncated: int = 0
    """Rows whose last answers were cut because they did not fit."""
    dropped: dict[str, int] = {}
    """Number of rows with nothing supervised, by reason."""
    left_out: dict[str, int] = {}
    """For each unused column or field of turns (`messages[].name`), the number of rows where it is not empty."""
    special_tokens: int = 0
    """Rows whose texts contain a special token of the tokenizer (data.special_tokens_in_text)."""
    notes: list[str] = []
    """Warnings about possible mistakes in data.train."""
    answers: int = 0
    """Different last answers of the training rows (of pairs, chosen ones)."""
    repeated: int = 0
    """Training rows with the same question and answer as another one."""
    contradicting: int = 0
    """Training rows with the same question as another one, but a different answer."""
    leaked: int = 0
    """Validation rows with the same question as a training row."""
    examples: list[str] = []
    """The first bad, dropped and contradicting rows, and the first with special tokens, by file and line."""
    train: SplitStats
    validation: SplitStats | None = None
    test: SplitStats | None = None
    """The rows used neither for training nor for validation (data.test)."""
    validation_reason: str = ""
    """Why the validation split has this size, or is missing, if data.validation is auto."""

    def lines(self) -> list[str]:
        """Returns the figures for the user, a line each."""
        text = [
            f"{self.read} rows read ({', '.join(self.formats)})" + (f", {self.bad} bad skipped" if self.bad else "")
        ]
        text += self.notes
        if self.left_out:
            text.append(left_out_line(self.left_out))
        text += [f"{n} rows dropped: {why}" for why, n in self.dropped.items()]
        if self.truncated:
            text.append(
                f"{self.truncated} rows truncated: their last answers did not fit data.max_length {self.max_length}; "
                f"the longest row needs {max(split.longest for split in (self.train, self.validation, self.test) if split)}"
            )
        if self.repeated:
            text.append(f"training rows that repeat another one: {self.repeated}")
        if self.contradicting:
            text.append(f"training rows that contradict another one: {self.contradicting}")
        if self.special_tokens:
            text.append(
                f"rows whose text contains special tokens of the model: {self.special_tokens} "
                "(data.special_tokens_in_text)"
            )
        text += self.examples
        for name, split in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if split:
                several = f" in {split.sequences} sequences" if split.sequences != split.rows else ""
                rated = (
                    "" if split.good is None else f" ({split.good} good answers, {split.sequences - split.good} bad)"
                )
                text.append(
                    f"{name}: {split.rows} rows{several}{rated}, {split.tokens} tokens, {split.supervised_tokens} "
                    f"supervised ({split.supervised_share:.0%}); a {'sequence' if several else 'row'} has "
                    f"{split.tokens / split.sequences:.0f} tokens on average, {split.longest_sequence} at most"
                )
        if self.validation_reason:
            text.append(f"validation: {self.validation_reason}")
        return text


def left_out_line(columns: Mapping[str, int]) -> str:
    """Lists unused columns for the user, grouped by their number of rows."""
    names: dict[int, list[str]] = {}
    for column, rows in sorted(columns.items(), key=lambda item: (-item[1], item[0])):
        names.setdefault(rows, []).append(column)
    return "left out: columns " + "; ".join(
        f"{', '.join(several)} ({rows} row{'s' * (rows != 1)})" for rows, several in names.items()
    )


def notes_on(sources: tuple[str, ...]) -> list[str]:
    """Returns warnings about possible mistakes in `sources`, the entries of data.train."""
    named = [file for source in sources for file in named_to_test(source)]
    if not named:
        return []
    return [
        "warning: files named like a test set are used for training with the rest of their folder: "
        f"{', '.join(named)}; to avoid that, list the training files in data.train"
    ]


@dataclass
class Tally:
    """Counts of one pass over the data."""

    fail: bool
    """Whether a bad row is an error (data.on_bad_row: fail)."""
    read: int = 0
    bad: int = 0
    sound: int = 0
    """Valid rows so far, including those not yet encoded."""
    first: DataError | None = None
    """The first bad row; raised once enough rows have been read to tell whether many are bad."""
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    files: dict[str, None] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    special: int = 0
    longest: int = 0

    def on_bad_row(self, error: DataError) -> None:
        """Counts a bad row and records the first ones as examples; if bad rows are errors, raises the first one after
        enough rows."""
        self.bad += 1
        if self.fail:
            self.first = self.first or error
            self.end(after=LOOKED_AT)
        elif self.bad <= NAMED:
            self.examples.append(f"skipped: {error}")

    def end(self, after: int = 0) -> None:
        """Raises the first bad row, if bad rows are errors and at least `after` rows have been read."""
        seen = self.sound + self.bad
        if not self.first or seen < after:
            return
        advice = "data.on_bad_row: skip ignores such rows, " if self.bad * FEW <= seen else ""
        raise DataError(
            f"{self.first} ({advice}{self.bad} bad in {seen} row{'s' * (seen != 1)}{' so far' * (seen >= LOOKED_AT)})"
        ) from self.first


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row with its content and tokens; only file and line of the row itself are kept."""

    row: Row
    content: Content
    encoded: Encoded


def encode_rows(
    conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, sources: tuple[str, ...], tally: Tally
) -> Iterator[Prepared]:
    """Yields every valid row of `sources` with its tokens, in order, including rows without any sequence."""
    encode = encoder_for(conf, tokenizer)
    formatter = Formatter(conf.data, conf.objective.reads)
    tally.formats, tally.left_out = formatter.formats, formatter.left_out
    special = SpecialTokens(tokenizer, conf.data.special_tokens_in_text == "escape")
    for found in _batches(_formatted(_processed(conf, sources, tally), formatter, tally, conf.data.max_rows)):
        batch, contents = _without_special(conf, found, special, tally)
        for (row, content), encoded in zip(batch, encode(contents), strict=True):
            if isinstance(encoded, DataError):
                tally.sound -= 1
                tally.on_bad_row(DataError(f"{row.place}: {encoded}"))
                continue
            tally.read += 1
            tally.truncated += encoded.truncated and bool(encoded.sequences)
            tally.longest = max(tally.longest, encoded.longest)
            if not encoded.sequences:
                tally.dropped[encoded.lost] += 1
                if tally.dropped[encoded.lost] <= NAMED:
                    tokens = f" ({encoded.longest} tokens)" if encoded.truncated else ""
                    tally.examples.append(f"dropped: {row.place}: {encoded.lost}{tokens}")
            yield Prepared(row, content, encoded)
    tally.end()


def _without_special(
    conf: FinetuneConf, batch: Batch, special: SpecialTokens, tally: Tally
) -> tuple[Batch, list[Content]]:
    """Returns the rows that data.special_tokens_in_text accepts, and their contents as they should be encoded."""
    passed, contents = [], []
    for row, content in batch:
        changed = content
        if token := special.found(content):
            message = f"{row.place}: its text contains {token!r}, a special token of the model"
            if conf.data.special_tokens_in_text == "fail":
                tally.sound -= 1
                tally.on_bad_row(DataError(f"{message} (data.special_tokens_in_text: fail)"))
                continue
            tally.special += 1
            if conf.data.special_tokens_in_text == "escape":
                changed = special.escaped(content)
            elif tally.special <= NAMED:
                tally.examples.append(f"special token: {message}: it is treated as one")
        passed.append((row, content))
        contents.append(changed)
    return passed, contents


def _processed(conf: FinetuneConf, sources: tuple[str, ...], tally: Tally) -> Iterator[Row]:
    rows = chain.from_iterable(read(source, tally.on_bad_row) for source in sources)
    return process(load_processor(conf.data.processor, conf.data.processor_args), rows) if conf.data.processor else rows


def _formatted(
    rows: Iterator[Row], formatter: Formatter, tally: Tally, most: int | None
) -> Iterator[tuple[Row, Content]]:
    try:
        for row in rows:
            tally.files[row.file] = None
            try:
                content = formatter(row)
            except DataError as error:
                tally.on_bad_row(error)
                continue
            tally.sound += 1
            tally.end(after=LOOKED_AT)
            yield Row(row.file, row.line, {}), content
            if tally.sound == most and not tally.first:
                return
    except DataError:
        tally.end()  # report the first error, if a bad row came before
        raise
    tally.end()


def _batches(rows: Iterator[tuple[Row, Content]]) -> Iterator[Batch]:
    """Yields batches, limited in rows and characters, which the tokenizer processes on all cores."""
    batch: Batch = []
    characters = 0
    for row, content in rows:
        batch.append((row, content))
        characters += _characters(content)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(content: Content) -> int:
    if isinstance(content, Pair):
        return _characters(content.chosen) + _characters(content.rejected)
    if isinstance(content, Rated):
        return _characters(content.conversation)
    return len(content.text) if isinstance(content, Text) else sum(len(text_of(m["content"])) for m in content.messages)


def prepare(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, out: Path, report: Report) -> DataStats:
    """Writes the conf's data to the folder `out`, which is replaced if it exists, and returns its figures.

    `report` is called with a line of progress every few seconds. Raises :class:`DataError` for a bad row (unless
    data.on_bad_row is skip), for data without anything supervised, and if `out` cannot be written.
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
    """Returns the figures of :func:`prepare` for all rows, or for the first `limit`, without keeping its output."""
    if limit:
        conf = conf.model_copy(
            update={"data": conf.data.model_copy(update={"max_rows": min(limit, conf.data.max_rows or limit)})}
        )
    with tempfile.TemporaryDirectory(prefix="llm-ray-data-") as folder:
        return prepare(conf, tokenizer, Path(folder) / "prepared", report)


def nothing_to_learn(conf: FinetuneConf, key: str, sources: tuple[str, ...], tally: Tally) -> DataError:
    """Returns the error for `key`, which names `sources`, if none of their rows has anything supervised."""
    found = f"{tally.read} rows read, {tally.bad} bad skipped"
    reasons = "".join(f"; {n} dropped: {why}" for why, n in tally.dropped.items())
    long = cut_off(tally.dropped)
    advice = (
        f"; the longest row has {tally.longest} tokens: raise data.max_length ({conf.data.max_length})" if long else ""
    )
    examples = "".join(f"\n  {example}" for example in tally.examples)
    return DataError(f"{key} ({', '.join(sources)}) has nothing to learn: {found}{reasons}{advice}{examples}")


def cut_off(dropped: Mapping[str, int]) -> int:
    """Returns how many of the dropped rows were too long."""
    return sum(dropped.get(why, 0) for why in (TOO_LONG, PAIR_TOO_LONG, RATED_TOO_LONG))


def open_split(out: Path, split: Split) -> datasets.Dataset:
    """Opens the sequences of a split, memory-mapped: columns input_ids and labels, lists of int32; for pairs also
    `chosen`, int32, the length of the row with the chosen answer, which is followed by the one with the rejected answer;
    for rated answers also `good`, bool, and `prompt`, int32, the number of tokens before the answer.

    Labels are aligned with input_ids (no shift), and -100 for unsupervised tokens, including always the first. Raises
    :class:`DataError` if the split was not prepared.
    """
    from datasets import Dataset

    file = out / split / "data.arrow"
    if not file.exists():
        raise DataError(f"{out}: no prepared {split} data: run the stage prepare with data.{split} set")
    return Dataset.from_file(str(file))


def has_validation(out: Path) -> bool:
    """Whether the prepared data in `out` has a validation split."""
    return (out / "validation").is_dir()


def evaluated_split(out: Path) -> Split | None:
    """Returns the split of the prepared data in `out` on which a trained model is evaluated: test if there is one, else
    validation."""
    return "test" if (out / "test").is_dir() else "validation" if has_validation(out) else None


def lengths_of(rows: datasets.Dataset, *, padded: bool = False) -> np.ndarray:
    """Returns the tokens of each sequence of an opened split, int64 [sequences]; with `padded`, the shorter row of a pair
    counts as padded to the longer one."""
    import numpy as np
    import pyarrow.compute as pc

    lengths = np.asarray(pc.list_value_length(rows.data.column("input_ids")).combine_chunks(), dtype=np.int64)
    if not padded or "chosen" not in rows.column_names:
        return lengths
    chosen = np.asarray(rows.data.column("chosen").combine_chunks(), dtype=np.int64)
    return 2 * np.maximum(chosen, lengths - chosen)


def prompts_of(rows: datasets.Dataset) -> np.ndarray:
    """Returns the number of tokens before each rated answer of an opened split: int64 [rows]."""
    import numpy as np

    return np.asarray(rows.data.column("prompt").combine_chunks(), dtype=np.int64)


def largest_token(out: Path) -> int:
    """Returns the largest token id in the prepared data in `out`."""
    import pyarrow.compute as pc

    splits: tuple[Split, ...] = ("train", "validation", "test")
    existing = [split for split in splits if (out / split).is_dir()]
    chunks = [chunk for split in existing for chunk in open_split(out, split).data.column("input_ids").chunks]
    return max((pc.max(chunk.flatten()).as_py() or 0 for chunk in chunks), default=0)


def read_stats(out: Path) -> DataStats:
    """Reads the figures that :func:`prepare` wrote to the folder `out`."""
    return DataStats.model_validate_json((out / "stats.json").read_text(encoding="utf-8"))


def evaluation_rows(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, prepared: Path) -> Iterator[Conversation]:
    """Yields the conversations for evaluation: those of evaluation.data, else the test rows, else the validation rows,
    else some of the training rows; none if the objective does not train answers.

    Pairs yield the conversation with the chosen answer, rated answers only those that are good. All are ready for
    :meth:`~llm_ray.models.chat.ChatTemplate.render`: tools are written out as text if the template does not support
    them.
    """
    if not conf.objective.answers:
        return
    if conf.evaluation.data is None:
        asked = next((file for name in (HELDOUT, TRAINED) if (file := prepared / name).exists()), None)
        if asked:
            with asked.open(encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    yield Conversation(row["messages"], row["tools"])
        return
    encoder = ChatEncoder(tokenizer, conf.data.max_length, conf.model.chat_template)
    tally = Tally(fail=conf.data.on_bad_row == "fail")
    for _, content in _formatted(
        _processed(conf, conf.evaluation.data, tally), Formatter(conf.data, conf.objective.reads), tally, None
    ):
        if conversation := _asked(content):
            yield encoder.adapt(conversation)


def questions_from(conf: FinetuneConf, prepared: Path) -> str:
    """Returns the source of :func:`evaluation_rows`, for the user."""
    if conf.evaluation.data:
        return "evaluation.data"
    return (
        f"{evaluated_split(prepared)} rows"
        if (prepared / HELDOUT).exists()
        else "training rows, because none are held out"
    )


# Inside ---------------------------------------------------------------------------------------------------------------


class _Rows:
    """Encoded rows on disk, in the order of the files, with a few numbers per row in memory."""

    def __init__(self, file: Path, reads: Reads) -> None:
        self.file, self.reads = file, reads
        # Per sequence: its row, its tokens, its supervised tokens.
        self.row_of = array("q")
        self.lengths = array("i")
        self.supervised = array("i")
        self.good = array("b")  # for rated answers
        # Per row: its tokens before cutting; hashes of its question, of what repeating or contradicting rows have in
        # common, and of its last answer (for pairs, the chosen one; the rating, if it has one); the number of its file,
        # and its line.
        self.longest = array("i")
        self.questions = array("Q")
        self.compared = array("Q")
        self.answers = array("Q")
        self.file_of = array("i")
        self.line_of = array("q")
        self.files: dict[str, int] = {}  # number of each file
        self.count = 0

    def write(self, rows: Iterator[Prepared], adapt: Callable[[Conversation], Conversation] | None) -> None:
        """Writes all rows that have sequences; with `adapt`, also their conversations, as JSON in a column of the first
        sequence."""
        import pyarrow as pa

        tokens = pa.list_(pa.int32())
        types = {"chosen": pa.int32(), "good": pa.bool_(), "prompt": pa.int32()}
        further = {name: types[name] for name in COLUMNS.get(self.reads, ())}
        schema = pa.schema({"input_ids": tokens, "labels": tokens, **further, "conversation": pa.large_string()})
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
                    for name in further:
                        columns[name].append(getattr(sequence, name))
                    self.good.append(bool(sequence.good))
                    columns["conversation"].append(_heldout_line(prepared, adapt) if adapt and not number else "")
                    size += len(sequence.input_ids)
                if prepared.encoded.sequences:
                    self.longest.append(prepared.encoded.longest)
                    question, answer = question_and_answer(prepared.content)
                    self.questions.append(text_hash(question))
                    self.compared.append(text_hash(_compared(prepared.content, question)))
                    self.answers.append(text_hash(answer))
                    self.file_of.append(self.files.setdefault(prepared.row.file, len(self.files)))
                    self.line_of.append(prepared.row.line)
                    self.count += 1
                if size > 1 << 18:
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    columns, size = {name: [] for name in schema.names}, 0
            if size:
                writer.write_batch(pa.record_batch(columns, schema=schema))

    def place(self, number: int) -> str:
        """Returns file and line of a row."""
        return place(list(self.files)[self.file_of[number]], self.line_of[number])

    def table(self) -> datasets.Dataset:
        from datasets import Dataset

        return Dataset.from_file(str(self.file)).with_format("arrow")


def _heldout_line(prepared: Prepared, adapt: Callable[[Conversation], Conversation]) -> str:
    asked = _asked(prepared.content)
    if not asked:
        return ""
    conversation = adapt(asked)
    line = {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "file": prepared.row.file,
        "line": prepared.row.line,
    }
    return json.dumps(line, ensure_ascii=False)


def _asked(content: Content) -> Conversation | None:
    """Returns the conversation to evaluate the model with, including the expected answer; None for plain text."""
    if isinstance(content, Rated):
        return content.conversation if content.good else None
    return content.chosen if isinstance(content, Pair) else content if isinstance(content, Conversation) else None


def _prepare(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, folder: Path, report: Report) -> DataStats:
    import numpy as np

    tallies: list[Tally] = []
    adapt = (
        ChatEncoder(tokenizer, conf.data.max_length, conf.model.chat_template).adapt if conf.objective.answers else None
    )

    def written(sources: tuple[str, ...], name: str, keep: bool) -> _Rows:
        rows = _Rows(folder / f"{name}.rows.arrow", conf.objective.reads)
        tally = Tally(fail=conf.data.on_bad_row == "fail")
        tallies.append(tally)
        rows.write(_reported(encode_rows(conf, tokenizer, sources, tally), tally, report), adapt if keep else None)
        if not any(rows.supervised):  # a loss over no token is 0.0 and looks like success
            raise nothing_to_learn(conf, f"data.{name}", sources, tally)
        return rows

    separate = isinstance(conf.data.validation, tuple)  # validation has separate files
    train = written(conf.data.train, "train", keep=not separate or conf.data.test is not None)
    # Position of each row in the order given by the seed: first validation, then test, then training rows.
    rank = np.random.default_rng(conf.training.seed).permutation(train.count)
    held, reason = held_out(conf.data.validation, train.count)
    tested = test_rows(conf.data.test, train.count, held)
    sequences = np.argsort(rank[np.array(train.row_of)], kind="stable")
    place_of = rank[np.array(train.row_of)][sequences]
    is_held, is_tested, is_learned = (
        place_of < held,
        (place_of >= held) & (place_of < held + tested),
        place_of >= held + tested,
    )
    questions = np.array(train.questions)
    is_trained = rank >= held + tested
    learned = questions[is_trained]
    stats: dict[Split, SplitStats] = {}
    asked = questions[rank < held]
    if held:
        stats["validation"] = _write_split(train, sequences[is_held], folder / "validation", report)
    elif isinstance(conf.data.validation, tuple):
        validation = written(conf.data.validation, "validation", keep=not tested)
        order = np.arange(len(validation.row_of))
        stats["validation"] = _write_split(validation, order, folder / "validation", report)
        if not tested:
            _write_heldout(validation, order, folder / HELDOUT)
        validation.file.unlink()
        asked = np.array(validation.questions)
    if tested:
        stats["test"] = _write_split(train, sequences[is_tested], folder / "test", report)
        _write_heldout(train, sequences[is_tested], folder / HELDOUT)
    elif held:
        _write_heldout(train, sequences[is_held], folder / HELDOUT)
    elif not separate:
        _write_heldout(train, sequences[:TRAINED_ROWS], folder / TRAINED)
    stats["train"] = _write_split(train, sequences[is_learned], folder / "train", report)
    train.file.unlink()
    np.save(folder / QUESTIONS, np.unique(learned))
    repeated, contradicting, examples = _repeats(train, is_trained)
    return DataStats(
        formats=list(dict.fromkeys(form for tally in tallies for form in tally.formats)),
        files=list(dict.fromkeys(file for tally in tallies for file in tally.files)),
        max_length=conf.data.max_length,
        read=sum(tally.read for tally in tallies),
        bad=sum(tally.bad for tally in tallies),
        truncated=sum(tally.truncated for tally in tallies),
        left_out=dict(sum((tally.left_out for tally in tallies), Counter[str]())),
        special_tokens=sum(tally.special for tally in tallies),
        notes=notes_on(conf.data.train),
        dropped=dict(sum((tally.dropped for tally in tallies), Counter[str]())),
        answers=len(np.unique(np.array(train.answers)[is_trained])),
        repeated=repeated,
        contradicting=contradicting,
        leaked=int(np.isin(asked, learned).sum()),
        examples=[example for tally in tallies for example in tally.examples] + examples,
        train=stats["train"],
        validation=stats.get("validation"),
        test=stats.get("test"),
        validation_reason=reason,
    )


def held_out(validation: object, rows: int) -> tuple[int, str]:
    """Returns the number of rows held out for validation, and for `auto` the reason. Raises DataError if none would be
    left to train on."""
    if validation == "auto":
        if rows < VALIDATION_FROM:
            return (
                0,
                f"none, because all {rows} rows are needed for training (from {VALIDATION_FROM} rows on, some are "
                "held out; data.validation)",
            )
        held = min(round(VALIDATION_SHARE * rows), VALIDATION_ROWS)
        return held, f"{held} of {rows} rows are held out (data.validation: auto)"
    if not isinstance(validation, float):
        return 0, ""
    held = max(1, round(validation * rows))
    if held >= rows:
        raise DataError(
            f"data.validation {validation} of {rows} usable row{'s' * (rows != 1)} leaves none to train on: add rows, "
            "or set data.validation: null"
        )
    return held, ""


def test_rows(share: float | None, rows: int, held: int) -> int:
    """Returns the number of rows held out as test split (data.test), besides `held` validation rows. Raises DataError if
    none would be left to train on."""
    if share is None:
        return 0
    tested = max(1, round(share * rows))
    if held + tested >= rows:
        raise DataError(
            f"data.test {share} and data.validation leave none of {rows} usable row{'s' * (rows != 1)} to train on: add "
            "rows, or lower one of them"
        )
    return tested


def _repeats(rows: _Rows, learned: np.ndarray) -> tuple[int, int, list[str]]:
    """Returns, for the rows marked by `learned`, how many repeat another one, how many contradict another one, and the
    first contradictions by file and line."""
    import numpy as np

    numbers = np.flatnonzero(learned)
    compared, answers = np.array(rows.compared)[numbers], np.array(rows.answers)[numbers]
    _, first_of, group = np.unique(compared, return_index=True, return_inverse=True)
    first = first_of[group]  # for each row, the first one with the same `compared`
    again = first != np.arange(len(numbers))
    other = again & (answers != answers[first])
    examples = [
        f"contradicting: {rows.place(numbers[one])} and {rows.place(numbers[first[one]])} "
        + (
            {
                "pairs": "prefer opposite answers of the same two",
                "ratings": "rate the same answer differently",
            }.get(rows.reads, "ask the same question and answer it differently")
        )
        for one in np.flatnonzero(other)[:NAMED]
    ]
    return int((again & ~other).sum()), int(other.sum()), examples


def question_and_answer(content: Content) -> tuple[str, str]:
    """Returns a row's question and answer, with case and white space normalized. For a text they are the text and "";
    for a pair, the prompt and the chosen answer; for a rated answer, the prompt and the rating."""
    if isinstance(content, Rated):
        return _plain(content.conversation.messages[: content.shared]), "good" if content.good else "bad"
    if isinstance(content, Pair):
        return (
            _plain(content.chosen.messages[: content.shared]),
            _plain(content.chosen.messages[content.shared :]),
        )
    if isinstance(content, Text):
        return " ".join(content.text.casefold().split()), ""
    answered = next(
        (n for n in range(len(content.messages) - 1, -1, -1) if content.messages[n]["role"] == "assistant"), 0
    )
    messages = content.messages[: answered + 1]
    return _plain(messages[:-1]), _plain(messages[-1:])


def _plain(messages: list[Message]) -> str:
    parts = [json.dumps([m["role"], m["content"], m.get("tool_calls")]) for m in messages]
    return "\n".join(" ".join(part.casefold().split()) for part in parts)


def _compared(content: Content, question: str) -> str:
    """Returns what repeating or contradicting rows have in common: the question; for pairs also both answers in a fixed
    order, and for rated answers the answer, since a prompt may have many."""
    if isinstance(content, Rated):
        return "\n".join([question, _plain(content.conversation.messages[content.shared :])])
    if not isinstance(content, Pair):
        return question
    answers = (side.messages[content.shared :] for side in (content.chosen, content.rejected))
    return "\n".join([question, *sorted(map(_plain, answers))])


def text_hash(text: str) -> int:
    """Returns a 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def asked_in_training(out: Path, conversations: Iterable[Conversation]) -> int:
    """Returns how many of the conversations have the same question as a training row of the prepared data in `out`."""
    import numpy as np

    learned = np.load(out / QUESTIONS)
    return int(
        np.isin(np.array([text_hash(question_and_answer(c)[0]) for c in conversations], dtype=np.uint64), learned).sum()
    )


def _reported(rows: Iterator[Prepared], tally: Tally, report: Report) -> Iterator[Prepared]:
    last = time.monotonic()
    for prepared in rows:
        yield prepared
        if time.monotonic() - last > 2:
            last = time.monotonic()
            report(f"prepare: {tally.read} rows read, at {prepared.row.place}")


def _write_heldout(rows: _Rows, sequences: np.ndarray, file: Path) -> None:
    table = rows.table().select_columns(["conversation"])
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, len(sequences), 1024):
            lines = table[sequences[start : start + 1024].tolist()]["conversation"].to_pylist()
            out.writelines(line + "\n" for line in lines if line)
    if not file.stat().st_size:
        file.unlink()


def _write_split(rows: _Rows, sequences: np.ndarray, folder: Path, report: Report) -> SplitStats:
    """Writes the sequences (indices into `rows`, in order) to ``folder/data.arrow`` and returns their figures."""
    import numpy as np
    import pyarrow as pa

    folder.mkdir()
    columns = ["input_ids", "labels", *COLUMNS.get(rows.reads, ())]
    table, last = rows.table().select_columns(columns), time.monotonic()
    lengths = np.array(rows.lengths)[sequences]
    per_batch = max(1, (1 << 18) // int(lengths.max()))
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.data.schema) as writer:
        for start in range(0, len(sequences), per_batch):
            gathered = table[sequences[start : start + per_batch].tolist()]
            writer.write_table(gathered.combine_chunks())
            if time.monotonic() - last > 2:
                last = time.monotonic()
                report(f"prepare: {start + per_batch} sequences of {folder.name} written")
    used = np.unique(np.array(rows.row_of)[sequences])
    total, supervised = int(lengths.sum()), int(np.array(rows.supervised)[sequences].sum())
    return SplitStats(
        rows=len(used),
        sequences=len(sequences),
        tokens=total,
        supervised_tokens=supervised,
        supervised_share=supervised / total,
        longest=int(np.array(rows.longest)[used].max()),
        longest_sequence=int(lengths.max()),
        mean=total / len(used),
        answer=supervised / len(used),
        good=int(np.array(rows.good)[sequences].sum()) if rows.reads == "ratings" else None,
    )
