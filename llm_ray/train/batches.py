"""Batches: the rows a worker computes in a step, how they are split into forward passes, and their layout as tensors.

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
    """The pairs of a batch of preference data, whose rows alternate: the chosen answer of a pair, then the rejected one.

    row_of: int64 [n], the row of each supervised token; tokens: int64 [pairs, 2], number of supervised tokens of both
    answers; reference: fp32 [pairs, 2], their log-probabilities under the base model, in nats (zeros if not given).
    """

    row_of: Tensor
    tokens: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows as input of the model, and the tokens to predict.

    input_ids, position_ids, attention_mask: int64 [1, tokens] with rows end to end (packed), or [rows, longest]
    (padded). row_lengths: tokens of each row. supervised: int64 [n], positions in the flattened input whose next token
    is supervised; targets: int64 [n], those next tokens. tokens: number of real tokens, without padding and filler rows.
    pairs: set for preference data.
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
    """Steps of a training over rows of `lengths` tokens: each step has `batch_size` rows, whatever the number of workers.

    `limit`: maximum tokens of a forward pass, padding included; `packed`: rows are concatenated without padding.
    """

    lengths: np.ndarray
    batch_size: int
    limit: int
    packed: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def indices(self, step: int, rank: int, workers: int) -> list[list[int]]:
        """Returns the row numbers of optimizer step `step` (from 0) for worker `rank` of `workers`: a list per forward
        pass, equally many on every worker. If there are too few rows, the last lists are empty."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        shares = [self._passes(share) for share in self._deal(rows, workers)]
        mine = shares[rank]
        return mine + [[] for _ in range(max(map(len, shares)) - len(mine))]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

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
    schedule = Schedule(lengths, as_run(training.global_batch_size), micro_batch_tokens(conf), packed, training.seed)
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
) -> Iterator[list[Batch]]:
    """Yields the batches of worker `rank` for steps `start` to `end` (exclusive): a list per step, with one batch per
    forward pass. `reference`: see :func:`collate`."""
    for step in range(start, end):
        yield [collate(data, indices, schedule.packed, reference) for indices in schedule.indices(step, rank, workers)]


def passes_over(lengths: np.ndarray, limit: int, rank: int, workers: int) -> list[list[int]]:
    """Returns the row numbers of one pass over the data for worker `rank`, in lists of at most `limit` tokens with
    padding; equally many lists on every worker."""
    return Schedule(lengths, max(1, len(lengths)), limit, packed=False, seed=0).indices(0, rank, workers)


def collate(data: datasets.Dataset, indices: list[int], packed: bool, reference: Tensor | None = None) -> Batch:
    """Builds a batch. Without `indices` it has one filler row with nothing supervised, since the worker must still take
    part in the step. `reference`: for pairs, fp32 [all pairs, 2], log-probabilities of their answers under the base
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
