"""Batches: which rows a worker takes at a step, in which forward passes, and how they are laid out as tensors.

The order is a pure function of seed, epoch and step, so a resumed run sees the same rows as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import Tensor

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import as_run
from llm_ray.data.encode import IGNORED

MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Pairs:
    """Of a batch of preference pairs, whose rows come two by two: the chosen answer of a pair, then the rejected one.

    row_of: int64 [n], the row of each supervised token; tokens: int64 [pairs, 2], supervised ones of both answers;
    reference: fp32 [pairs, 2], their log-probabilities under the base model, in nats (zeros where it is not asked).
    """

    row_of: Tensor
    tokens: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows as the model takes them, and what it is to predict.

    input_ids, position_ids, attention_mask: int64 [1, tokens] with rows end to end (packed), or [rows, longest]
    (padded).
    row_lengths: tokens of each row. supervised: int64 [n], positions in the flattened input whose next token is supervised;
    targets: int64 [n], those next tokens. tokens: real ones, padding and filling left out. pairs: of preference pairs,
    what else there is to know of them.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    row_lengths: list[int]
    supervised: Tensor
    targets: Tensor
    tokens: int
    pairs: Pairs | None = None


@dataclass(frozen=True)
class Schedule:
    """Steps of a training over rows of `lengths` tokens: each step takes `batch_size` rows, whatever workers there are.

    `limit`: most tokens that a worker computes at once, padding included; `packed`: rows are laid end to end, without
    padding.
    """

    lengths: np.ndarray
    batch_size: int
    limit: int
    packed: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def take(self, step: int, rank: int, workers: int) -> list[list[int]]:
        """Row numbers for optimizer step `step` (from 0) on worker `rank` of `workers`: a list for each forward pass,
        as many on every worker. Where there are too few rows for all, the last lists are empty."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        shares = [self._passes(share) for share in self._deal(rows, workers)]
        mine = shares[rank]
        return mine + [[] for _ in range(max(map(len, shares)) - len(mine))]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def _deal(self, rows: list[int], workers: int) -> list[list[int]]:
        """The rows shared out so that workers have about as many tokens: the longest first, to the one with the fewest
        (Graham 1969)."""
        shares: list[list[int]] = [[] for _ in range(workers)]
        tokens = [0] * workers
        for row in sorted(rows, key=lambda row: -self.lengths[row]):
            least = tokens.index(min(tokens))
            shares[least].append(row)
            tokens[least] += int(self.lengths[row])
        return shares

    def _passes(self, rows: list[int]) -> list[list[int]]:
        """A worker's rows, the longest first, in passes of at most `limit` tokens; a row longer than that has a pass of
        its own."""
        passes: list[list[int]] = []
        room: dict[
            int, int
        ] = {}  # of each pass that is not full: tokens, or where rows are padded to its first one's length: rows
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
    """The schedule over rows of `lengths` tokens, and the number of optimizer steps of the whole training.

    `conf` is one without `auto` (``llm_ray.train.auto``).
    """
    training = conf.training
    schedule = Schedule(lengths, as_run(training.global_batch_size), micro_batch_tokens(conf), packed, training.seed)
    return schedule, training.max_steps or max(1, round(as_run(training.epochs) * schedule.steps_per_epoch))


def micro_batch_tokens(conf: FinetuneConf) -> int:
    """Most tokens that a worker computes at once."""
    return conf.training.micro_batch_tokens or max(MICRO_BATCH_TOKENS, conf.data.max_length)


def steps_of(
    data: datasets.Dataset,
    schedule: Schedule,
    rank: int,
    workers: int,
    start: int,
    end: int,
    reference: Tensor | None = None,
) -> Iterator[list[Batch]]:
    """The batches of worker `rank` for steps `start` to `end` (exclusive): a list of one batch per forward pass, for
    each step. `reference`: as of :func:`collate`."""
    for step in range(start, end):
        yield [collate(data, indices, schedule.packed, reference) for indices in schedule.take(step, rank, workers)]


def passes_over(lengths: np.ndarray, limit: int, rank: int, workers: int) -> list[list[int]]:
    """Row numbers of one pass over all rows for worker `rank`, in padded lists of at most `limit` tokens; as many lists
    on every worker."""
    return Schedule(lengths, max(1, len(lengths)), limit, packed=False, seed=0).take(0, rank, workers)


def collate(data: datasets.Dataset, indices: list[int], packed: bool, reference: Tensor | None = None) -> Batch:
    """Lay the rows out. Without any, one row with nothing supervised: the worker has to take part in the step all the
    same. `reference`: of a data set of pairs, fp32 [all pairs, 2], log-probabilities of their answers under the base
    model."""
    rows: list[tuple[list[int], list[int]]] = []
    pairs = "chosen" in data.column_names
    for index in indices or [0]:
        row = data[index]
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
    place = 0
    for number, (ids, labels) in enumerate(rows):
        row, at = (0, place) if packed else (number, 0)
        to = at + len(ids)
        input_ids[row, at:to] = torch.tensor(ids)
        position_ids[row, at:to] = torch.arange(len(ids))
        mask[row, at:to] = 1
        target[row, at : to - 1] = torch.tensor(
            labels[1:], dtype=torch.int64
        )  # each position predicts the next token of its own row
        place = to
    flat = target.flatten()
    supervised = (flat != IGNORED).nonzero()[:, 0]
    return Batch(
        input_ids,
        position_ids,
        mask,
        lengths,
        supervised,
        flat[supervised],
        sum(lengths) if indices else 0,
        _pairs(indices, lengths, supervised, width, packed, reference) if pairs else None,
    )


def _pairs(
    indices: list[int], lengths: list[int], supervised: Tensor, width: int, packed: bool, reference: Tensor | None
) -> Pairs:
    ends = torch.tensor(lengths).cumsum(0)
    row_of = torch.bucketize(supervised, ends, right=True) if packed else supervised // width
    tokens = torch.bincount(row_of, minlength=2 * len(indices))[: 2 * len(indices)].view(-1, 2)
    return Pairs(row_of, tokens, torch.zeros(len(indices), 2) if reference is None else reference[indices])
