"""A finetune's data as the model sees it: preview of the first rows, and statistics of all.

preview(load_finetune("lora", ["train=tickets.jsonl"]), rows=3)
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data import prepare
from llm_ray.data.encode import Sequence
from llm_ray.data.prepare import DataStats
from llm_ray.models.load import find_base, load_tokenizer
from llm_ray.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Bar",
    "DataStats",
    "Examined",
    "Preview",
    "PreviewRow",
    "PreviewSequence",
    "Span",
    "examine",
    "histogram",
    "preview",
    "statistics",
]


Answer = Literal["", "chosen", "rejected", "good", "bad"]


@dataclass(frozen=True)
class Span:
    """Decoded text of consecutive tokens that are all supervised or all unsupervised, including special tokens."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class PreviewSequence:
    """A training sequence. `tokens` and `supervised` are token counts; `answer` says which answer of a preference pair
    it is, or how the answer is rated."""

    spans: tuple[Span, ...]
    tokens: int
    supervised: int
    answer: Answer = ""


@dataclass(frozen=True)
class PreviewRow:
    """A row: its file and line, its sequences (none if it is dropped), and the token count of the longest one before
    truncation."""

    place: str
    sequences: tuple[PreviewSequence, ...]
    longest: int
    cut: bool
    """Whether answers were left out because they exceed data.max_length."""
    dropped: str
    """Why the row is dropped; empty if it is not."""


@dataclass(frozen=True)
class Preview:
    """The first valid rows, with notes on the data."""

    rows: tuple[PreviewRow, ...]
    notes: tuple[str, ...]
    """Notes on skipped rows, special tokens in texts, and files that look like test data."""
    left_out: dict[str, int]
    """Unused columns, with the number of rows that have them."""
    formats: tuple[str, ...]

    def left_out_line(self) -> str:
        """Returns a message about unused columns; empty if there are none."""
        return prepare.left_out_line(self.left_out) if self.left_out else ""


def preview(conf: FinetuneConf, rows: int = 3) -> Preview:
    """Returns the first `rows` rows of data.train as tokens. Raises DataError, also if there is nothing to learn, and
    ModelError."""
    return _preview(conf, load_tokenizer(find_base(conf.model, conf.paths)), rows)


def _preview(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, rows: int) -> Preview:
    tally = prepare.Tally(fail=conf.data.on_bad_row == "fail")
    few = conf.model_copy(update={"data": conf.data.model_copy(update={"max_rows": rows})})
    found = tuple(_row(tokenizer, one) for one in prepare.encode_rows(few, tokenizer, conf.data.train, tally))
    if len(found) < rows and not any(row.sequences for row in found):  # all rows were read
        raise prepare.nothing_to_learn(conf, "data.train", conf.data.train, tally)
    noticed = [example for example in tally.examples if example.startswith(("skipped", "special token"))]
    notes = (*noticed, *prepare.notes_on(conf.data.train))
    return Preview(found, notes, dict(tally.left_out), tuple(tally.formats))


def statistics(conf: FinetuneConf, reporter: Reporter, limit: int | None = None) -> DataStats:
    """Returns statistics of all rows, or of the first `limit`; stores nothing. Raises DataError, ModelError."""
    return prepare.statistics(conf, load_tokenizer(find_base(conf.model, conf.paths)), limit, reporter.line)


@dataclass(frozen=True)
class Examined:
    """Statistics, histogram of sequence lengths, and preview of the data."""

    figures: DataStats
    bars: tuple[Bar, ...]
    preview: Preview

    def left_out_line(self) -> str:
        """Returns a message about unused columns; empty if there are none."""
        return prepare.left_out_line(self.figures.left_out) if self.figures.left_out else ""


@dataclass(frozen=True)
class Bar:
    """A histogram bar: the number of sequences with `first` to `last` tokens, inclusive."""

    first: int
    last: int
    sequences: int


def examine(conf: FinetuneConf, rows: int, reporter: Reporter) -> Examined:
    """Reads all rows once and previews the first `rows`; stores nothing. Raises DataError, ModelError."""
    tokenizer = load_tokenizer(find_base(conf.model, conf.paths))
    with tempfile.TemporaryDirectory(prefix="llm-ray-data-") as folder:
        prepared = Path(folder) / "prepared"
        figures = prepare.prepare(conf, tokenizer, prepared, reporter.line)
        splits: list[prepare.Split] = ["train", "validation"] if figures.validation else ["train"]
        lengths = [
            length for split in splits for length in prepare.lengths_of(prepare.open_split(prepared, split)).tolist()
        ]
    return Examined(figures, histogram(lengths), _preview(conf, tokenizer, rows))


def histogram(lengths: list[int], most: int = 20) -> tuple[Bar, ...]:
    """Returns a histogram of `lengths` with at most `most` bars of equal width."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // most)
    counts = Counter((length - low) // width for length in lengths)
    return tuple(
        Bar(low + n * width, min(low + (n + 1) * width - 1, high), counts[n]) for n in range((high - low) // width + 1)
    )


def spans(tokenizer: PreTrainedTokenizerBase, sequence: Sequence) -> list[Span]:
    """Returns the sequence as text."""
    # Runs of tokens are decoded together, since a character may span several tokens.
    runs = groupby(zip(sequence.input_ids, sequence.labels, strict=True), lambda token: token[1] >= 0)
    return [
        Span(
            tokenizer.decode(
                [token for token, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            supervised,
        )
        for supervised, run in runs
    ]


def _row(tokenizer: PreTrainedTokenizerBase, prepared: prepare.Prepared) -> PreviewRow:
    encoded = prepared.encoded
    return PreviewRow(
        prepared.row.place,
        tuple(
            PreviewSequence(
                tuple(spans(tokenizer, row)), len(row.input_ids), sum(label >= 0 for label in row.labels), answer
            )
            for one in encoded.sequences
            for answer, row in zip(_answers(one), one.rows(), strict=True)
        ),
        encoded.longest,
        encoded.truncated,
        encoded.lost,
    )


def _answers(sequence: Sequence) -> tuple[Answer, ...]:
    if sequence.good is not None:
        return ("good",) if sequence.good else ("bad",)
    return ("chosen", "rejected") if sequence.chosen else ("",)
