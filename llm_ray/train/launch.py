"""The driver side of training on Ray Train: starts the workers, shows progress, stops them, explains failures."""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from llm_ray.cluster import Workers, describe, node_selector, room_for
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import LlmRayError, Stopped, TrainError
from llm_ray.models.load import Base
from llm_ray.progress import Bar, Reporter
from llm_ray.runs.folder import stop_file
from llm_ray.runs.metrics import read_metrics
from llm_ray.train.checkpoint import list_checkpoints, step_of
from llm_ray.train.task import NOTES_FILE, Outcome, Task, train_here, worker_environment

SNAPSHOT = "checkpoint_manager_snapshot.json"
# Wait after a failure before continuing with fewer workers: if only a worker died, its CPUs are free again by then.
_SETTLE_SECONDS = 20.0
_HOST_SECONDS = 900.0  # how long to wait for lost hosts
_REPORT_SECONDS = 60.0
# Messages of RuntimeErrors that a retry may fix.
_PASSING = re.compile(
    r"gloo|connect|peer|socket|timed? ?out|store|rendezvous|process group|barrier|memory|allocat|thread", re.IGNORECASE
)


class Recurring(TrainError):
    """Training failed in a way that a retry would not fix."""


def run_training(
    conf: FinetuneConf, base: Base, workers: Workers, resume_from: Path | None, reporter: Reporter
) -> Outcome:
    """Trains as the conf says, on the connected Ray. The run's stop file, or the first Ctrl-C, requests a checkpoint and
    a stop; the second Ctrl-C stops immediately.

    Lost workers are handled here and not by Ray Train, which would wait forever for a host that does not come back:
    training continues from the last checkpoint, with fewer workers if `runtime.min_workers` allows it. Raises Stopped
    if a stop was requested, TrainError if training failed.
    """
    folder = conf.run_dir / "checkpoint"
    lost = 0
    stop = _Stop(stop_file(conf.run_dir), reporter)
    (folder / NOTES_FILE).unlink(missing_ok=True)
    try:
        with reporter.bar("training") as bar:
            while True:
                # Ray's own list of checkpoints is stale after a crash; the folders on disk are authoritative.
                (folder / SNAPSHOT).unlink(missing_ok=True)
                fit = _Fit(_trainer(conf, base, workers, resume_from))
                _follow(fit, conf, bar, stop, reporter)
                try:
                    outcome = fit.outcome(conf)
                    break
                except TrainError as error:
                    lost += not _is_no_fault(error.__cause__)
                    if stop.asked() or isinstance(error, Recurring):
                        raise
                    if lost > conf.runtime.max_failures:
                        raise TrainError(
                            f"{error} (This was failure {lost}; runtime.max_failures is {conf.runtime.max_failures}.)"
                        ) from error
                    reporter.line(f"  {_first_sentence(error)}")
                    workers = _remaining_workers(conf, workers.cpus, stop, reporter)
                    reporter.line(f"  {workers.number} worker(s) continue from {_last_checkpoint(folder)}")
    finally:
        stop.file.unlink(missing_ok=True)
    if outcome["status"] == "failed":
        raise TrainError(f"training of {conf.name} failed: {outcome['reason']}")
    if outcome["status"] == "stopped":
        raise Stopped(f"{conf.name}: {outcome['reason']}. Run the same command to continue from there.")
    return outcome


def _trainer(conf: FinetuneConf, base: Base, workers: Workers, resume_from: Path | None) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    from llm_ray.train.network import GlooConfig

    return TorchTrainer(
        train_here,
        train_loop_config=Task(
            conf=conf.model_dump(mode="json"),
            base=base,
            cpus=workers.cpus,
            resume_from=str(resume_from) if resume_from else None,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.number,
            resources_per_worker={"CPU": workers.cpus},
            placement_strategy=conf.runtime.placement.upper(),
            label_selector=node_selector(conf.runtime, workers.cluster) or None,
        ),
        run_config=ray.train.RunConfig(
            name="checkpoint",
            storage_path=str(conf.run_dir),
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            worker_runtime_env={"env_vars": worker_environment()},
        ),
        torch_config=GlooConfig(interface=conf.runtime.interface),
    )


def _is_no_fault(error: BaseException | None) -> bool:
    """True for preemption or failed placement, which do not count as failures."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import PreemptionError

    placed = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
    return isinstance(error, PreemptionError) or (
        isinstance(error, ControllerError) and isinstance(error.controller_failure, placed)
    )


def _remaining_workers(conf: FinetuneConf, cpus: int, stop: _Stop, reporter: Reporter) -> Workers:
    """Returns the cluster after a failure and the number of workers it has room for. Waits for lost hosts, but only
    briefly if enough workers fit without them.

    Raises TrainError if they do not come back, Stopped if a stop is requested meanwhile.
    """
    fewest = conf.runtime.min_workers or conf.runtime.workers
    began, reported_at = time.monotonic(), 0.0
    while True:
        now = describe()
        room = room_for(conf.runtime, now, cpus)
        waited = time.monotonic() - began
        if room == conf.runtime.workers or (room >= fewest and waited > _SETTLE_SECONDS):
            return Workers(now, room, cpus)
        if stop.asked():
            raise Stopped(f"{conf.name}: stopped while waiting for hosts. {_resume_hint(conf)}")
        if waited > _HOST_SECONDS:
            raise TrainError(
                f"training of {conf.name} needs {fewest} worker(s) with {cpus} CPU(s) each, but the remaining hosts "
                f"({', '.join(now.hosts) or 'none'}) have room for {room}: start the lost hosts, or set "
                f"runtime.min_workers. {_resume_hint(conf)}"
            )
        if room < fewest and time.monotonic() - reported_at > _REPORT_SECONDS:
            reported_at = time.monotonic()
            reporter.line(
                f"  waiting for hosts: {fewest} worker(s) needed, room for {room} on {', '.join(now.hosts) or 'none'}"
            )
        stop.sleep(1)


def _last_checkpoint(folder: Path) -> str:
    found = list_checkpoints(folder)
    return f"the checkpoint of step {step_of(found[-1])}" if found else "the start, because there is no checkpoint yet"


class _Stop:
    """A request for a checkpoint and a stop: a file that other processes may create, too. The first Ctrl-C creates it,
    the second raises KeyboardInterrupt."""

    def __init__(self, file: Path, reporter: Reporter) -> None:
        self.file, self._reporter = file, reporter
        self._interrupted = self._reported = False

    def asked(self) -> bool:
        """Whether a stop is requested; tells the user the first time."""
        asked = self._interrupted or self.file.exists()
        if asked and not self._reported:
            self._reported = True
            again = "again" if self._interrupted else "twice"
            self._reporter.line(
                f"Stopping after this step, with a checkpoint (Ctrl-C {again}: immediately, resuming later from the "
                "last checkpoint) …"
            )
        return asked

    def interrupt(self) -> None:
        """Handles Ctrl-C. Raises KeyboardInterrupt on the second."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self.file.touch()

    def sleep(self, seconds: float) -> None:
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            self.interrupt()


class _Fit(threading.Thread):
    """Runs `trainer.fit()` in a thread, so that the main thread can show progress and handle Ctrl-C (in the main thread,
    fit would handle the signal itself)."""

    def __init__(self, trainer: object) -> None:
        super().__init__(daemon=True, name="ray-train-fit")
        self._trainer = trainer
        self._result: Outcome | None = None
        self._error: BaseException | None = None
        # Not Thread.join: after Ctrl-C in it, Python 3.11 takes the thread for ended (CPython bpo-45274).
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self._result = self._trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as error:  # raised in the main thread by outcome()
            self._error = error
        finally:
            self.ended.set()

    def outcome(self, conf: FinetuneConf) -> Outcome:
        if self._error is not None:
            raise _explain(self._error, conf) from self._error
        if self._result is None:
            raise TrainError(f"training of {conf.name} ended without a result from its first worker")
        return self._result


def _follow(fit: _Fit, conf: FinetuneConf, bar: Bar, stop: _Stop, reporter: Reporter) -> None:
    shown, notes = -1, conf.run_dir / "checkpoint" / NOTES_FILE
    while not fit.ended.is_set():
        try:
            stop.asked()  # to tell the user
            fit.ended.wait(0.5)
            if notes.is_file():
                reporter.line(
                    "".join(f"  {line}\n" for line in notes.read_text(encoding="utf-8").splitlines()).rstrip()
                )
                notes.unlink()
            rows = read_metrics(conf.run_dir / "metrics.jsonl", last=1)
            if rows and rows[-1]["step"] != shown and "loss" in rows[-1]:
                row = rows[-1]
                shown = row["step"]
                bar.update(
                    shown, row["total_steps"], f"loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tokens/s"
                )
        except KeyboardInterrupt:
            stop.interrupt()


def _explain(error: BaseException, conf: FinetuneConf) -> TrainError:
    """Returns the failure as an error for the user: who failed, why, and what to do."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    causes = {f"worker {rank} of {conf.name}": _cause(failure) for rank, failure in failures.items()}
    causes = causes or {f"training of {conf.name}": _cause(error)}
    resume = _resume_hint(conf)
    less = "Lower training.micro_batch_tokens or data.max_length, set training.gradient_checkpointing, for LoRA model.weights int8 or int4, or use training.strategy fsdp over more workers"
    for who, cause in causes.items():
        if isinstance(cause, OutOfMemoryError):
            found = re.search(r"Memory on the node \(IP: (\S+),.*? was (\S+ used / \S+) limit", str(cause))
            host = f"the host {found[1]} ({found[2]})" if found else "its host"
            return TrainError(f"{who} was killed because {host} ran out of memory. {less}. {resume}")
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):  # torch's allocator raises RuntimeError
            return TrainError(f"{who} could not allocate memory ({_first_line(cause)}). {less}. {resume}")
    for cause in causes.values():
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(conf.run_dir).free
            return TrainError(
                f"no space left on the disk of {conf.run_dir} ({free / 2**30:.1f} GiB free): free some space. {resume}"
            )
    for who, cause in causes.items():
        if isinstance(cause, ActorDiedError):
            return TrainError(
                f"{who} died: its process was killed, most often by the kernel because memory ran out, or its host "
                f"was lost. If it was memory: {less[0].lower()}{less[1:]}. {resume}"
            )
    who, cause = next(((who, cause) for who, cause in causes.items() if _recurs(cause)), next(iter(causes.items())))
    if _recurs(cause):
        return Recurring(
            f"{who} failed: {type(cause).__name__}: {_first_line(cause)}. A retry would fail the same way, so none "
            "is made: the cause is in the model, the data or the conf, or is a bug in llm-ray. Completed work is "
            "kept; run the same command once the cause is fixed"
        )
    return TrainError(f"{who} failed: {type(cause).__name__}: {_first_line(cause)}. {resume}")


def _recurs(cause: BaseException) -> bool:
    """Whether the same code and data would raise a worker's exception again: it does not come from the network, the
    host or another worker."""
    if type(cause) is RuntimeError:  # torch raises it for everything
        return not _PASSING.search(str(cause))
    certain = (
        LlmRayError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        ImportError,
        NotImplementedError,
    )
    return isinstance(cause, certain)


def _resume_hint(conf: FinetuneConf) -> str:
    return (
        f"Checkpoints are complete: run the same command to continue from the last one (llm-ray runs show {conf.name})"
    )


def _first_sentence(error: TrainError) -> str:
    """The error's first sentence; its advice is shown only with the error that ends the run."""
    return str(error).split(". ")[0]


def _cause(failure: BaseException) -> BaseException:
    """Unwraps Ray Train's exception: an error of the training function, a worker's death, a failure of its
    controller."""
    for name in ("_base_exc", "health_check_failure", "controller_failure"):
        failure = getattr(failure, name, failure)
    return failure


def _first_line(error: BaseException) -> str:
    # Ray's messages may be pages long.
    return next(iter(str(error).splitlines()), "").rstrip(".")
