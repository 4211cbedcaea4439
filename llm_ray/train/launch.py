"""Training on Ray Train, seen from the driver: start the workers, show how far they are, stop them, and say what went wrong."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from pathlib import Path

from llm_ray.cluster import Cluster, check_resources
from llm_ray.conf.schema import FinetuneConf
from llm_ray.console import Bar, Reporter
from llm_ray.errors import TrainError
from llm_ray.runs.metrics import read_metrics
from llm_ray.train.recipe import STOP_FILE, Outcome, Task, train, worker_environment

SNAPSHOT = "checkpoint_manager_snapshot.json"


class Stopped(TrainError):
    """Training was asked to stop, and did, with a checkpoint to go on from."""

    exit_code = 130


def run_training(conf: FinetuneConf, cluster: Cluster, resume_from: Path | None, reporter: Reporter) -> Outcome:
    """Train as the conf says, on the joined Ray. The first Ctrl-C asks for a checkpoint and an end, the second ends at once.

    Raises ClusterError when the workers do not fit, Stopped after Ctrl-C, TrainError when training failed.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from llm_ray.train.network import GlooConfig

    folder = conf.run_dir / "checkpoint"
    cpus = check_resources(conf.runtime, cluster)
    # Ray's own list of checkpoints would go stale with an unclean end; what is on disk is the truth.
    (folder / SNAPSHOT).unlink(missing_ok=True)
    (folder / STOP_FILE).unlink(missing_ok=True)
    trainer = TorchTrainer(
        train,
        train_loop_config=Task(conf=conf.model_dump(mode="json"), cpus=cpus, resume_from=str(resume_from) if resume_from else None),
        scaling_config=ray.train.ScalingConfig(
            num_workers=conf.runtime.workers, resources_per_worker={"CPU": cpus}, placement_strategy=conf.runtime.placement.upper()
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(conf.run_dir),
            failure_config=ray.train.FailureConfig(max_failures=conf.runtime.max_failures),
            worker_runtime_env={"env_vars": worker_environment()},
        ),
        torch_config=GlooConfig(interface=conf.runtime.interface),
    )
    fit = _Fit(trainer)
    try:
        with reporter.bar("training") as bar:
            _follow(fit, conf, bar, reporter)
    finally:
        (folder / STOP_FILE).unlink(missing_ok=True)
    outcome = fit.outcome(conf)
    if outcome["status"] == "failed":
        raise TrainError(f"training of {conf.name} failed: {outcome['reason']}")
    if outcome["status"] == "stopped":
        raise Stopped(f"{conf.name}: {outcome['reason']}. The same command goes on from there.")
    return outcome


class _Fit(threading.Thread):
    """`trainer.fit()` beside the main thread, which stays free for progress and Ctrl-C (fit would take the signal for itself)."""

    def __init__(self, trainer: object) -> None:
        super().__init__(daemon=True, name="ray-train-fit")
        self._trainer = trainer
        self._result: Outcome | None = None
        self._error: BaseException | None = None
        self.ended = threading.Event()  # Ctrl-C in Thread.join makes Python 3.11 take the thread for ended (CPython bpo-45274)
        self.start()

    def run(self) -> None:
        try:
            self._result = self._trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as error:  # handed to the main thread, whatever it is
            self._error = error
        finally:
            self.ended.set()

    def outcome(self, conf: FinetuneConf) -> Outcome:
        if self._error is not None:
            raise _explain(self._error, conf) from self._error
        if self._result is None:
            raise TrainError(f"training of {conf.name} ended without a result: its first worker gave none")
        return self._result


def _follow(fit: _Fit, conf: FinetuneConf, bar: Bar, reporter: Reporter) -> None:
    asked = False
    shown = -1
    while not fit.ended.is_set():
        try:
            fit.ended.wait(0.5)
            rows = read_metrics(conf.run_dir / "metrics.jsonl", last=1)
            if rows and rows[-1]["step"] != shown and "loss" in rows[-1]:
                row = rows[-1]
                shown = row["step"]
                bar.update(shown, row["total_steps"], f"loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tokens/s")
        except KeyboardInterrupt:
            if asked:
                raise
            asked = True
            (conf.run_dir / "checkpoint" / STOP_FILE).touch()
            reporter.line("Stopping after this step, with a checkpoint (Ctrl-C again: at once, going on later from the last checkpoint) …")


def _explain(error: BaseException, conf: FinetuneConf) -> TrainError:
    """The failure in words for the user: who failed, of what, and what to do."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    causes = {f"worker {rank} of {conf.name}": _cause(failure) for rank, failure in failures.items()}
    causes = causes or {f"training of {conf.name}": _cause(error)}
    resume = f"Checkpoints are whole: the same command goes on from the last one (llm-ray runs show {conf.name})"
    less = (
        "Lower training.batch_size or data.max_length, set training.gradient_checkpointing, or use training.strategy fsdp over more workers"
    )
    for who, cause in causes.items():
        if isinstance(cause, OutOfMemoryError):
            found = re.search(r"Memory on the node \(IP: (\S+),.*? was (\S+ used / \S+) limit", str(cause))
            host = f"the host {found[1]} ({found[2]})" if found else "its host"
            return TrainError(f"{who} was ended because {host} ran out of memory. {less}. {resume}")
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):  # torch's allocator raises RuntimeError
            return TrainError(f"{who} got no more memory ({_first_line(cause)}). {less}. {resume}")
    for cause in causes.values():
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(conf.run_dir).free
            return TrainError(f"no space left on the disk of {conf.run_dir} ({free / 2**30:.1f} GiB free): make room. {resume}")
    for who, cause in causes.items():
        if isinstance(cause, ActorDiedError):
            return TrainError(
                f"{who} died {conf.runtime.max_failures + 1} time(s) (runtime.max_failures is {conf.runtime.max_failures}): killed from outside, "
                f"most often by the kernel for want of memory, or its host went away. If it was memory: {less[0].lower()}{less[1:]}. {resume}"
            )
    who, cause = next(iter(causes.items()))
    return TrainError(f"{who} failed: {type(cause).__name__}: {_first_line(cause)}. {resume}")


def _cause(failure: BaseException) -> BaseException:
    """What Ray Train has wrapped: an error of the training function, a worker's death, a failure of its controller."""
    for name in ("_base_exc", "health_check_failure", "controller_failure"):
        failure = getattr(failure, name, failure)
    return failure


def _first_line(error: BaseException) -> str:
    # Ray's own messages go on for pages.
    return next(iter(str(error).splitlines()), "").rstrip(".")
