"""A finetune's data as the model will see it: the first rows, and statistics of all.

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


@dataclass(frozen=True)
class Span:
    """Text of neighbouring tokens that are all supervised, or all not; special tokens are visible."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class PreviewSequence:
    """A sequence that the model is trained on. `tokens` and `supervised` are counts; of a pair, `answer` says which of
    the two answers it ends in."""

    spans: tuple[Span, ...]
    tokens: int
    supervised: int
    answer: Literal["", "chosen", "rejected"] = ""


@dataclass(frozen=True)
class PreviewRow:
    """A row: its file and line, the sequences that it gives (none: it is dropped), and the tokens of the longest before
    anything was cut."""

    place: str
    sequences: tuple[PreviewSequence, ...]
    longest: int
    cut: bool
    """Whether answers were left out that did not fit data.max_length."""
    dropped: str
    """Why nothing of it is left; empty where something is."""


@dataclass(frozen=True)
class Preview:
    """The first sound rows, and what was noticed on the way."""

    rows: tuple[PreviewRow, ...]
    notes: tuple[str, ...]
    """Rows that were skipped, special tokens in texts, files that may be meant for tests."""
    left_out: dict[str, int]
    """Columns that are not used, with the number of rows that have them."""
    formats: tuple[str, ...]

    def left_out_line(self) -> str:
        """The columns that are not used, for people; empty where there are none."""
        return prepare.left_out_line(self.left_out) if self.left_out else ""


def preview(conf: FinetuneConf, rows: int = 3) -> Preview:
    """The first `rows` rows of data.train as tokens. Raises DataError, also when there is nothing to learn;
    ModelError."""
    return _preview(conf, load_tokenizer(find_base(conf.model, conf.paths)), rows)


def _preview(conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, rows: int) -> Preview:
    tally = prepare.Tally(fail=conf.data.on_bad_row == "fail")
    few = conf.model_copy(update={"data": conf.data.model_copy(update={"max_rows": rows})})
    found = tuple(_row(tokenizer, one) for one in prepare.encode_rows(few, tokenizer, conf.data.train, tally))
    if len(found) < rows and not any(row.sequences for row in found):  # all of it was looked at
        raise prepare.nothing_to_learn(conf, "data.train", conf.data.train, tally)
    noticed = [example for example in tally.examples if example.startswith(("skipped", "special token"))]
    notes = (*noticed, *prepare.notes_on(conf.data.train))
    return Preview(found, notes, dict(tally.left_out), tuple(tally.formats))


def statistics(conf: FinetuneConf, reporter: Reporter, limit: int | None = None) -> DataStats:
    """Figures of all rows, or of the first `limit`; nothing is kept. Raises DataError, ModelError."""
    return prepare.statistics(conf, load_tokenizer(find_base(conf.model, conf.paths)), limit, reporter.line)


@dataclass(frozen=True)
class Examined:
    """All that there is to see of data: its figures, how long its sequences are, and its first rows."""

    figures: DataStats
    bars: tuple[Bar, ...]
    preview: Preview

    def left_out_line(self) -> str:
        """The columns that are not used, for people; empty where there are none."""
        return prepare.left_out_line(self.figures.left_out) if self.figures.left_out else ""


@dataclass(frozen=True)
class Bar:
    """Of a histogram: `sequences` that have `first` to `last` tokens."""

    first: int
    last: int
    sequences: int


def examine(conf: FinetuneConf, rows: int, reporter: Reporter) -> Examined:
    """Read all rows once, and show the first `rows`; nothing is kept. Raises DataError, ModelError."""
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
    """How many there are of each length: bars of the same width, at most so many."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // most)
    counts = Counter((length - low) // width for length in lengths)
    return tuple(
        Bar(low + n * width, min(low + (n + 1) * width - 1, high), counts[n]) for n in range((high - low) // width + 1)
    )


def spans(tokenizer: PreTrainedTokenizerBase, sequence: Sequence) -> list[Span]:
    """The sequence as text."""
    # Whole runs are decoded: a character may be spread over several tokens.
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


def _answers(sequence: Sequence) -> tuple[Literal["", "chosen", "rejected"], ...]:
    return ("chosen", "rejected") if sequence.chosen else ("",)
