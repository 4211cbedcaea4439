"""Batches: which packed sequences a worker takes at a step, and how they are laid out as tensors.

The order is a pure function of seed, epoch and step, so that a resumed run sees what the unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor

from llm_ray.conf.schema import FinetuneConf

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Rows as the model takes them, and what it is to predict.

    input_ids, position_ids, attention_mask: int64 [1, tokens] with rows end to end (packed), or [rows, longest] (padded).
    row_lengths: tokens of each row. supervised: int64 [n], positions in the flattened input whose next token is supervised;
    targets: int64 [n], those next tokens. tokens: real ones, padding and filling left out.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    row_lengths: list[int]
    supervised: Tensor
    targets: Tensor
    tokens: int


@dataclass(frozen=True)
class Schedule:
    """Steps of a training over `sequences` packed sequences: each step takes `batch_size` × `accumulation` × `workers` of them.

    `present`: workers that there are, where some of them are lost: a step takes the same sequences, in more forward passes.
    """

    sequences: int
    batch_size: int
    accumulation: int
    workers: int
    seed: int
    present: int | None = None

    @property
    def per_step(self) -> int:
        return self.batch_size * self.accumulation * self.workers

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.sequences // self.per_step)

    def take(self, step: int, rank: int) -> list[list[int]]:
        """Sequence numbers for optimizer step `step` (from 0) on worker `rank`: a list for each forward pass.

        At an epoch's end there may be too few for all: the last lists are then short or empty.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)[within * self.per_step : (within + 1) * self.per_step]
        present = self.present or self.workers
        width = self.batch_size * present
        passes = -(-self.accumulation * self.workers // present)
        return [order[pass_ * width : (pass_ + 1) * width][rank::present] for pass_ in range(passes)]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.sequences, generator=generator).tolist()


def plan_steps(conf: FinetuneConf, sequences: int, present: int | None = None) -> tuple[Schedule, int]:
    """The conf's schedule over `sequences` packed sequences (on `present` workers, where some are lost), and the number of optimizer
    steps of the whole training."""
    training = conf.training
    schedule = Schedule(sequences, training.batch_size, training.gradient_accumulation, conf.runtime.workers, training.seed, present)
    return schedule, training.max_steps or max(1, round(conf.epochs * schedule.steps_per_epoch))


def steps_of(data: datasets.Dataset, schedule: Schedule, rank: int, start: int, end: int, packed: bool) -> Iterator[list[Batch]]:
    """The batches of worker `rank` for steps `start` to `end` (exclusive): a list of one batch per forward pass, for each step."""
    for step in range(start, end):
        yield [collate(data, indices, packed) for indices in schedule.take(step, rank)]


def shares(count: int, batch_size: int, rank: int, workers: int) -> list[list[int]]:
    """Sequence numbers of a validation for worker `rank`, in lists of `batch_size`; as many lists on every worker."""
    lists = -(-count // (batch_size * workers))
    mine = list(range(rank, count, workers))
    return [mine[i * batch_size : (i + 1) * batch_size] for i in range(lists)]


def collate(data: datasets.Dataset, indices: list[int], packed: bool) -> Batch:
    """Lay the sequences out. Without any, one sequence with nothing supervised: the worker has to take part in the step all the same."""
    rows: list[tuple[list[int], list[int]]] = []
    for index in indices or [0]:
        sequence = data[index]
        start = 0
        for length in sequence["lengths"]:
            labels = sequence["labels"][start : start + length] if indices else [IGNORE] * length
            rows.append((sequence["input_ids"][start : start + length], labels))
            start += length
    lengths = [len(ids) for ids, _ in rows]
    width = sum(lengths) if packed else max(lengths)
    input_ids = torch.zeros(1 if packed else len(rows), width, dtype=torch.int64)
    position_ids, mask, target = torch.zeros_like(input_ids), torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE)
    place = 0
    for number, (ids, labels) in enumerate(rows):
        row, at = (0, place) if packed else (number, 0)
        to = at + len(ids)
        input_ids[row, at:to] = torch.tensor(ids)
        position_ids[row, at:to] = torch.arange(len(ids))
        mask[row, at:to] = 1
        target[row, at : to - 1] = torch.tensor(labels[1:], dtype=torch.int64)  # each position predicts the next token of its own row
        place = to
    flat = target.flatten()
    supervised = (flat != IGNORE).nonzero()[:, 0]
    return Batch(input_ids, position_ids, mask, lengths, supervised, flat[supervised], sum(lengths) if indices else 0)
