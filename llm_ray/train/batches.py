"""Batches: the rows a worker computes in a step, how they are split into forward passes, and their layout as tensors.

The order is a pure function of seed, epoch and step, so a resumed run sees the same rows as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import as_run
from llm_ray.data.encode import IGNORED
from llm_ray.data.prepare import lengths_of, prompts_of

MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch of preference data, whose rows alternate: the chosen answer of a pair, then the rejected one.

    tokens: int64 [pairs, 2], number of supervised tokens of both answers; reference: fp32 [pairs, 2], their
    log-probabilities under the base model, in nats (zeros if not given).
    """

    tokens: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Ratings:
    """The ratings of a batch of rated answers. good: bool [answers]; reference: fp32 [answers], their log-probabilities
    under the base model, in nats (zeros if not given); divergence: of the model from its base, in nats, as estimated for
    the step (zero if it is not)."""

    good: Tensor
    reference: Tensor
    divergence: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Rows as input of the model, and the tokens to predict.

    input_ids, position_ids, attention_mask: int64 [1, tokens] with rows end to end (packed), or [rows, longest]
    (padded). row_lengths: tokens of each row. supervised: int64 [n], positions in the flattened input whose next token
    is supervised; targets: int64 [n], those next tokens. tokens: number of real tokens, without padding and filler rows.
    pairs, ratings: set for preference data and for rated answers.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    row_lengths: list[int]
    supervised: Tensor
    targets: Tensor
    tokens: int
    pairs: Pairs | None = None
    ratings: Ratings | None = None

    @property
    def row_of(self) -> Tensor:
        """The row of each supervised token: int64 [n]."""
        if len(self.input_ids) == 1:  # packed, or a single row
            return torch.bucketize(self.supervised, torch.tensor(self.row_lengths).cumsum(0), right=True)
        return self.supervised // self.input_ids.shape[1]

    def with_divergence(self, divergence: float) -> Batch:
        """Returns the batch of rated answers with this divergence."""
        return self if self.ratings is None else replace(self, ratings=replace(self.ratings, divergence=divergence))


@dataclass(frozen=True)
class Mismatches:
    """Rows with the prompts of the rows of a data set of rated answers, and the answers of other ones.

    answer_of: int64 [rows], the number of the row whose answer it is; lengths: int64 [rows], tokens; longest: tokens at
    which they are cut, since a long answer may come behind a long prompt.
    """

    answer_of: np.ndarray
    lengths: np.ndarray
    longest: int


@dataclass(frozen=True)
class Schedule:
    """Steps of a training over rows of `lengths` tokens: each step has `batch_size` rows, whatever the number of workers.

    `limit`: maximum tokens of a forward pass, padding included; `packed`: rows are concatenated without padding;
    `together`: every epoch has the same steps, in another order, so that a row always meets the same others.
    """

    lengths: np.ndarray
    batch_size: int
    limit: int
    packed: bool
    seed: int
    together: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def indices(self, step: int, rank: int, workers: int) -> list[list[int]]:
        """Returns the row numbers of optimizer step `step` (from 0) for worker `rank` of `workers`: a list per forward
        pass, equally many on every worker. If there are too few rows, the last lists are empty."""
        shares = [self._passes(share) for share in self._deal(self._rows(step), workers)]
        mine = shares[rank]
        return mine + [[] for _ in range(max(map(len, shares)) - len(mine))]

    def neighbours(self) -> np.ndarray:
        """Returns for each row the one before it in its step, for the first the last one: int64 [rows]. The row of a step
        that has no other gets the one before it in the epoch. Needs `together`."""
        order = np.array(self._order(0, len(self.lengths)), dtype=np.int64)
        before = np.empty_like(order)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            before[rows] = np.roll(rows, 1) if len(rows) > 1 else order[start - 1]
        return before

    def _rows(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps_per_epoch)
        if self.together and epoch:
            within, epoch = self._order(epoch, self.steps_per_epoch)[within], 0
        return self._order(epoch, len(self.lengths))[within * self.batch_size : (within + 1) * self.batch_size]

    def _order(self, epoch: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).tolist()

    def _deal(self, rows: list[int], workers: int) -> list[list[int]]:
        """Distributes the rows so that workers get about the same number of tokens: longest first, each to the worker
        with the fewest (Graham 1969)."""
        shares: list[list[int]] = [[] for _ in range(workers)]
        tokens = [0] * workers
        for row in sorted(rows, key=lambda row: -self.lengths[row]):
            least = tokens.index(min(tokens))
            shares[least].append(row)
            tokens[least] += int(self.lengths[row])
        return shares

    def _passes(self, rows: list[int]) -> list[list[int]]:
        """Splits a worker's rows, longest first, into passes of at most `limit` tokens (first fit); a longer row gets a
        pass of its own."""
        passes: list[list[int]] = []
        # Free space of each pass that is not full: in tokens if packed, else in rows padded to the length of its first.
        room: dict[int, int] = {}
        least = int(min(self.lengths[rows], default=0)) if self.packed else 1
        for row in rows:
            length = int(self.lengths[row])
            size = length if self.packed else 1
            fits = next((number for number, free in room.items() if free >= size), None)
            if fits is None:
                fits = len(passes)
                passes.append([])
                room[fits] = self.limit if self.packed else max(1, self.limit // length)
            passes[fits].append(row)
            room[fits] -= size
            if room[fits] < least:
                del room[fits]
        return passes


def plan_steps(conf: FinetuneConf, lengths: np.ndarray, packed: bool = True) -> tuple[Schedule, int]:
    """Returns the schedule over rows of `lengths` tokens, and the total number of optimizer steps.

    `conf` must not contain `auto` (``llm_ray.train.auto``).
    """
    training = conf.training
    batch_size, together = as_run(training.global_batch_size), conf.tuning.mismatches
    schedule = Schedule(lengths, batch_size, micro_batch_tokens(conf), packed, training.seed, together)
    return schedule, training.max_steps or max(1, round(as_run(training.epochs) * schedule.steps_per_epoch))


def micro_batch_tokens(conf: FinetuneConf) -> int:
    """Returns the maximum number of tokens in a forward pass."""
    return conf.training.micro_batch_tokens or max(MICRO_BATCH_TOKENS, conf.data.max_length)


def steps_of(
    data: datasets.Dataset,
    schedule: Schedule,
    rank: int,
    workers: int,
    start: int,
    end: int,
    reference: Tensor | None = None,
    mismatches: Mismatches | None = None,
) -> Iterator[list[Batch]]:
    """Yields the batches of worker `rank` for steps `start` to `end` (exclusive): a list per step, with one batch per
    forward pass. `reference`, `mismatches`: see :func:`collate`."""
    for step in range(start, end):
        passes = schedule.indices(step, rank, workers)
        yield [collate(data, indices, schedule.packed, reference, mismatches) for indices in passes]


def mismatches_of(data: datasets.Dataset, answer_of: np.ndarray, longest: int) -> Mismatches:
    """Returns the rows with the prompts of `data` and the answers of the rows `answer_of`, int64 [rows], cut at `longest`
    tokens."""
    prompts = prompts_of(data)
    answers = lengths_of(data) - prompts
    return Mismatches(answer_of, np.minimum(prompts + answers[answer_of], longest), longest)


def whole_split(data: datasets.Dataset, longest: int) -> Mismatches:
    """Returns the rows with the prompts of `data` and the answers of the rows half the data before, as if all were rows of
    one step: for validation. (The row right before may have the same prompt, if both are of a pair.) See
    :func:`mismatches_of`."""
    return mismatches_of(data, np.roll(np.arange(len(data)), max(1, len(data) // 2)), longest)


def passes_over(lengths: np.ndarray, limit: int, rank: int, workers: int) -> list[list[int]]:
    """Returns the row numbers of one pass over the data for worker `rank`, in lists of at most `limit` tokens with
    padding; equally many lists on every worker."""
    return Schedule(lengths, max(1, len(lengths)), limit, packed=False, seed=0).indices(0, rank, workers)


def collate(
    data: datasets.Dataset,
    indices: list[int],
    packed: bool,
    reference: Tensor | None = None,
    mismatches: Mismatches | None = None,
) -> Batch:
    """Builds a batch. Without `indices` it has one filler row with nothing supervised, since the worker must still take
    part in the step. `reference`: log-probabilities under the base model, for pairs fp32 [all pairs, 2] of their answers,
    for rated answers fp32 [all rows, 1 or 2] of the answer, and of that of `mismatches`. With `mismatches`, those rows are
    built instead of the data's own."""
    rows: list[tuple[list[int], list[int]]] = []
    pairs, rated = "chosen" in data.column_names, "good" in data.column_names
    good: list[bool] = []
    for index in indices or [0]:
        row = data[index]
        if mismatches:
            row = _mismatched(row, data[int(mismatches.answer_of[index])], mismatches.longest)
        if rated:
            good.append(row["good"])
        ids, labels = row["input_ids"], row["labels"] if indices else [IGNORED] * len(row["labels"])
        cut = row["chosen"] if pairs else len(ids)
        rows += [(ids[part], labels[part]) for part in (slice(0, cut), slice(cut, None))[: 1 + pairs]]
    lengths = [len(ids) for ids, _ in rows]
    width = sum(lengths) if packed else max(lengths)
    input_ids = torch.zeros(1 if packed else len(rows), width, dtype=torch.int64)
    position_ids, mask, target = (
        torch.zeros_like(input_ids),
        torch.zeros_like(input_ids),
        torch.full_like(input_ids, IGNORED),
    )
    offset = 0
    for number, (ids, labels) in enumerate(rows):
        row, at = (0, offset) if packed else (number, 0)
        to = at + len(ids)
        input_ids[row, at:to] = torch.tensor(ids)
        position_ids[row, at:to] = torch.arange(len(ids))
        mask[row, at:to] = 1
        # Each position predicts the next token of its own row.
        target[row, at : to - 1] = torch.tensor(labels[1:], dtype=torch.int64)
        offset = to
    flat = target.flatten()
    supervised = (flat != IGNORED).nonzero()[:, 0]
    batch = Batch(
        input_ids,
        position_ids,
        mask,
        lengths,
        supervised,
        flat[supervised],
        sum(lengths) if indices else 0,
    )
    if pairs:
        tokens = torch.bincount(batch.row_of, minlength=2 * len(indices))[: 2 * len(indices)].view(-1, 2)
        given = torch.zeros(len(indices), 2) if reference is None else reference[indices]
        return replace(batch, pairs=Pairs(tokens, given))
    if rated:
        given = torch.zeros(len(indices)) if reference is None else reference[indices, int(mismatches is not None)]
        return replace(batch, ratings=Ratings(torch.tensor(good[: len(indices)], dtype=torch.bool), given))
    return batch


def _mismatched(row: dict[str, Any], other: dict[str, Any], longest: int) -> dict[str, Any]:
    """Returns a row with the prompt of `row` and the answer of `other`."""
    return row | {
        name: (row[name][: row["prompt"]] + other[name][other["prompt"] :])[:longest]
        for name in ("input_ids", "labels")
    }
