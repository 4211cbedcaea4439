"""Runs some real training steps to measure their cost: time, and memory per worker.

    cost = measure(conf, base, prepared, cpus=2)
    cost.seconds_per_token, cost.memory

Each worker is a separate process with the set-up of training (`recipe.set_up`), so model, precision, strategy and
batches are the real ones; results are discarded. Local runs use as many processes as there will be workers, connected by
gloo. For the workers of a cluster a single process stands in: torch's "fake" process group shards the model but
exchanges nothing, so the cost of the network is not measured.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_ray.cluster import environment
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import LlmRayError, TrainError
from llm_ray.hardware import forget_peak_memory, malloc_environment, peak_memory
from llm_ray.models.load import Base

SECONDS = 6.0
"""How long to measure steps, after a first one as warm-up."""
FEWEST_STEPS, MOST_STEPS = 3, 12
LONG_PASS = 20.0
"""If a forward and backward pass takes longer, in seconds, or needs too much memory, its cost is extrapolated from
smaller ones."""
DEADLINE = 900.0


@dataclass(frozen=True)
class Cost:
    """The cost of a training on this host: seconds per token of a step and of a validation (tokens of all workers
    together), and peak memory per worker in bytes."""

    seconds_per_token: float
    validation_seconds_per_token: float
    memory: float
    notes: tuple[str, ...] = ()
    """Remarks for the user on how training is computed."""
    first_step_seconds: float = 0.0
    """Extra time of the first step: caches are cold, and the optimizer creates its state."""


def measure(conf: FinetuneConf, base: Base, prepared: Path, cpus: int) -> Cost:
    """Runs some steps of the training of `conf`, which must not contain `auto`, on the prepared rows. Raises
    LlmRayError."""
    local = conf.runtime.mode == "local"
    # A forked process would inherit the state of torch's thread pools without their threads.
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory(prefix="llm-ray-trial-") as folder:
        arguments = (conf.model_dump(mode="json"), base, str(prepared), cpus)
        workers = [
            context.Process(
                target=_worker, args=(*arguments, rank, f"{folder}/rendezvous" if local else "", results), daemon=True
            )
            for rank in range(conf.runtime.workers if local else 1)
        ]
        try:
            with environment(malloc_environment()):  # as for Ray's workers
                for worker in workers:
                    worker.start()
            costs = [_result(workers, results) for _ in workers]
        finally:
            for worker in workers:
                if worker.pid is not None:  # it was started
                    worker.kill()
                    worker.join()
    slowest = max(costs, key=lambda cost: cost.seconds_per_token)
    return replace(slowest, memory=max(cost.memory for cost in costs))


def _result(workers: list[Any], results: Any) -> Cost:
    """Waits for the next worker's result. Raises the worker's error, or TrainError if one died or takes too long."""
    began = time.monotonic()
    while True:
        try:
            result: Cost | LlmRayError = results.get(timeout=1)
        except queue.Empty:
            died = [w for w in workers if w.exitcode]
            if died and results.empty():
                raise TrainError(_why_ended(died[0].exitcode)) from None
            if time.monotonic() - began > DEADLINE:
                raise TrainError(f"the trial steps took more than {DEADLINE / 60:.0f} minutes") from None
            continue
        if isinstance(result, LlmRayError):
            raise result
        return result


def _why_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "the trial steps were killed, most often because memory ran out: lower training.micro_batch_tokens or "
            "data.max_length, or set training.gradient_checkpointing"
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the process of the trial steps ended {how}: what it wrote above says why"


def _worker(
    conf_json: dict[str, Any], base: Base, prepared: str, cpus: int, rank: int, rendezvous: str, results: Any
) -> None:
    _end_with_parent()
    import torch.distributed as dist

    from llm_ray.train.workers import OtherWorkerFailed

    conf = FinetuneConf.model_validate(conf_json)
    try:
        if rendezvous and conf.runtime.workers > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=conf.runtime.workers
            )
        elif conf.runtime.workers > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=rank, world_size=conf.runtime.workers, store=FakeStore())
        results.put(_steps(conf, base, Path(prepared), cpus, rank))
    except OtherWorkerFailed:
        pass  # that worker reports the problem
    except LlmRayError as error:
        results.put(error)
    except Exception as error:
        results.put(
            TrainError(
                f"the trial steps failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        )
    results.close()
    results.join_thread()


def _end_with_parent() -> None:
    """Makes the kernel end this process when the thread that started it ends: a killed dry run would otherwise leave it
    computing on all cores (prctl(2), PR_SET_PDEATHSIG)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before
        os._exit(1)


def _steps(conf: FinetuneConf, base: Base, prepared: Path, cpus: int, rank: int) -> Cost:
    import psutil
    import torch

    from llm_ray.data.prepare import lengths_of, open_split
    from llm_ray.train.batches import Batch, collate, mismatches_of, plan_steps
    from llm_ray.train.recipe import accumulate, average_gradients, set_up, update
    from llm_ray.train.workers import broadcast

    workers = conf.runtime.workers
    setup = set_up(conf, base, cpus, rank, workers)
    data = open_split(prepared, "train")
    lengths = lengths_of(data)
    schedule, total_steps = plan_steps(conf, lengths_of(data, padded=not setup.packed), setup.packed)
    answers = mismatches_of(data, schedule.neighbours(), conf.data.max_length) if conf.tuning.mismatches else None
    sampled = range(min(total_steps, 200))
    passes = [pass_ for step in sampled for pass_ in schedule.indices(step, rank, workers)]
    heaviest = max(passes, key=lambda rows: _computed(lengths[rows], setup.packed))
    whole = _computed(lengths[heaviest], setup.packed)

    def mismatched(passes: list[list[int]]) -> list[Batch]:
        return [collate(data, rows, setup.packed, mismatches=answers) for rows in passes] if answers else []

    def pass_seconds(rows: list[int]) -> float:
        began = time.perf_counter()
        accumulate(setup, [collate(data, rows, setup.packed)], mismatched([rows]))
        return time.perf_counter() - began

    def step(batches: list[Batch], compared: list[Batch]) -> float:
        began = time.perf_counter()
        _, weight, _ = accumulate(setup, batches, compared)
        update(setup, average_gradients(setup.module, 1 / max(1.0, weight)), conf.training.max_grad_norm)
        return time.perf_counter() - began

    # Start with smaller passes: they warm up, and show whether the largest pass would take too long or too much memory.
    few, more = _parts(heaviest, lengths, setup.packed)
    tokens_few, tokens_more = (_computed(lengths[rows], setup.packed) for rows in (few, more))
    cold = pass_seconds(few)
    before, _ = _peak(lambda: 0.0)
    memory_few, seconds_few = _peak(lambda: min(pass_seconds(few) for _ in range(3)))
    too_slow = seconds_few * whole / tokens_few > LONG_PASS
    free = psutil.virtual_memory().available / workers
    too_large = (memory_few - before) * whole / tokens_few > free
    if broadcast(len(few) < len(heaviest) and (too_slow or too_large)):
        began = time.perf_counter()
        # The optimizer's state needs memory, too.
        update(setup, average_gradients(setup.module, 1.0), conf.training.max_grad_norm)
        update_seconds = time.perf_counter() - began
        pass_seconds(more)  # warm-up: malloc keeps memory that is allocated after an update
        memory_few, _ = _peak(lambda: pass_seconds(few))
        memory_more, seconds_more = _peak(lambda: min(pass_seconds(more) for _ in range(2)))
        each = max(0.0, memory_more - memory_few) / max(1, tokens_more - tokens_few)
        memory = memory_more + each * (whole - tokens_more)
        # Check memory again: scaling up the small pass, as above, also scales its constant part.
        if broadcast(too_slow or memory - before > free):
            tokens_step = lengths.sum() / schedule.steps_per_epoch
            rate = (
                seconds_more / tokens_more * _padding(lengths, passes, setup.packed) / workers
                + update_seconds / tokens_step
            )
            return Cost(float(rate), float(rate) / 3, memory, tuple(setup.notes))

    setup.optimizer.zero_grad()
    rates: list[float] = []
    warming = max(0.0, cold - seconds_few)
    began = time.perf_counter()
    number = -1
    while broadcast(len(rates) < FEWEST_STEPS or (len(rates) < MOST_STEPS and time.perf_counter() - began < SECONDS)):
        number += 1
        mine = schedule.indices(number, rank, workers)
        tokens = sum(
            lengths[rows].sum() for other in range(workers) for rows in schedule.indices(number, other, workers) if rows
        )
        of_answers = replace(schedule, lengths=answers.lengths).indices(number, rank, workers) if answers else []
        seconds = step([collate(data, rows, setup.packed) for rows in mine], mismatched(of_answers))
        if number:
            rates.append(seconds / tokens)
        else:
            first_tokens, first_seconds = tokens, seconds
    memory, _ = _peak(lambda: pass_seconds(heaviest))
    setup.module.eval()
    with torch.no_grad(), setup.autocast():
        batch = collate(data, heaviest, setup.packed)
        began = time.perf_counter()
        setup.module(batch)
        validation = (time.perf_counter() - began) / batch.tokens / workers
    # The median ignores steps that were disturbed by other processes, as long as they are a minority.
    rate = statistics.median(rates)
    warming += max(0.0, first_seconds - rate * first_tokens)
    return Cost(float(rate), validation, memory, tuple(setup.notes), float(warming))


def _computed(lengths: np.ndarray, packed: bool) -> int:
    """Number of tokens computed in a pass over rows of these lengths, padding included."""
    return int(lengths.sum() if packed else lengths.max(initial=0) * len(lengths))


def _padding(lengths: np.ndarray, passes: list[list[int]], packed: bool) -> float:
    """Computed tokens per real token."""
    real = sum(int(lengths[rows].sum()) for rows in passes)
    return sum(_computed(lengths[rows], packed) for rows in passes) / real


def _parts(rows: list[int], lengths: np.ndarray, packed: bool) -> tuple[list[int], list[int]]:
    """The first rows with about an eighth, and with about a quarter, of the tokens. The second list is longer by at
    least one row, unless the first contains all."""
    whole = _computed(lengths[rows], packed)
    few, more = (_beginning(rows, lengths, whole / part, packed) for part in (8, 4))
    return few, rows[: max(len(more), len(few) + 1)]


def _beginning(rows: list[int], lengths: np.ndarray, tokens: float, packed: bool) -> list[int]:
    """The first rows, at least one, that have at most so many computed tokens."""
    count = 1
    while count < len(rows) and _computed(lengths[rows[: count + 1]], packed) <= tokens:
        count += 1
    return rows[:count]


def _peak(work: Any) -> tuple[float, float]:
    """Runs `work`; returns this process's peak memory meanwhile, in bytes, and the result."""
    forget_peak_memory()
    value = work()
    return float(peak_memory()), value
