"""One trial on Ray Tune: a finetune in a thread of the trial's process, which reports each validation to Tune.

The trial's process uses no CPU; its training workers do. It is a class because Tune waits until a class has cleaned up:
Tune kills the process of a function that is asked to stop, and its Ray Train workers would keep their cores.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError
from ray import tune

from llm_ray.cluster import Workers, describe
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.sweep import SweepConf
from llm_ray.data.prepare import lengths_of, open_split, read_stats
from llm_ray.errors import LlmRayError, Stopped
from llm_ray.files import write_json
from llm_ray.models.load import find_base, has_experts, load_config, width_of
from llm_ray.progress import Reporter, Silent
from llm_ray.runs.folder import RUN, RunFolder, stop_file
from llm_ray.sweep.folder import SweepFolder, Trial, history
from llm_ray.train.auto import choose
from llm_ray.train.batches import plan_steps

_POLL = 0.2  # seconds


class Finetune(Protocol):
    """Runs a conf's stages on workers of the connected Ray."""

    def __call__(self, conf: FinetuneConf, reporter: Reporter, *, workers: Workers) -> Path: ...


@dataclass(frozen=True)
class Task:
    """The arguments shared by all trials."""

    conf: dict[str, Any]  # SweepConf as JSON
    base: dict[str, Any]  # its FinetuneConf as JSON
    cpus: int  # of each worker of a trial
    environment: Mapping[str, str]
    finetune: Finetune

    def folder(self) -> SweepFolder:
        return SweepFolder(SweepConf.model_validate(self.conf), FinetuneConf.model_validate(self.base))


class Training(threading.Thread):
    """Runs the finetune of a trial in a thread, since Tune calls the trial in another."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True, name="trial")
        self._work = work
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # reported by the trial
            self.error = error


class TuneTrial(tune.Trainable):
    """Each `step` lasts until the next validation."""

    def setup(self, config: dict[str, Any], task: Task) -> None:
        os.environ.update(task.environment)
        self._task, self._folder = task, task.folder()
        number = config["trial"]
        self._trial = next(trial for trial in self._folder.trials() if trial.number == number)
        self._began = time.monotonic()
        self._reported = 0
        self._path = self._folder.trials_folder / self._trial.name
        self._training = Training(self._finetune)
        self._training.start()

    def _finetune(self) -> None:
        folder, task = self._folder, self._task
        share_data(folder, self._trial)
        conf = folder.trial_conf(self._trial, task.cpus, validate_every(folder, self._trial, task.cpus))
        workers = Workers(describe(), conf.runtime.workers, task.cpus)
        task.finetune(conf, Silent(), workers=workers)

    def step(self) -> dict[str, Any]:
        """Waits for the next validation, or the end. Raises LlmRayError if the training failed or was interrupted."""
        while self._training.is_alive():
            if self._folder.stop_file.exists():
                self._ask_to_stop()
            points = self._history()
            if len(points) > self._reported and points[-1][0] < 1:
                self._reported = len(points)
                self._write(share=points[-1][0], metric=points[-1][1], history=points)
                return self._result(done=False)
            self._training.join(_POLL)
        self._end()
        return self._result(done=True)

    def _end(self) -> None:
        """Records the result of a training that ended by itself."""
        points = self._history()
        seconds = self._trial.seconds + time.monotonic() - self._began
        known = {"seconds": seconds, "history": points}
        if points:
            known |= {"share": points[-1][0], "metric": points[-1][1]}
        error = self._training.error
        if error is None and not points:
            error = LlmRayError("its training ended without a validation")
        if error is None:
            self._write(state="done", **known)
        elif isinstance(error, Stopped):
            self._write(state="begun", reason="interrupted; can be continued", **known)
            raise error
        else:
            self._write(state="failed", reason=_words(error), **known | {"metric": None})
            raise error

    def cleanup(self) -> None:
        """Called when Tune is done with the trial. If it is still training, Tune has stopped it in favour of better
        trials."""
        if self._training.is_alive():
            while self._training.is_alive():  # repeat: the run's folder may not exist yet
                self._ask_to_stop()
                self._training.join(_POLL)
            if isinstance(self._training.error, Stopped) and not self._folder.stop_file.exists():
                points = self._history()
                seconds = self._trial.seconds + time.monotonic() - self._began
                reason = f"stopped at {points[-1][0]:.0%}: others were better by then"
                known = {"share": points[-1][0], "metric": points[-1][1], "history": points}
                self._write(state="stopped", reason=reason, seconds=seconds, **known)
            else:
                with contextlib.suppress(Exception):  # recorded in the trial
                    self._end()

    def _ask_to_stop(self) -> None:
        file = stop_file(self._path)
        if (self._path / "conf.yaml").exists() and not file.exists():  # started: an earlier file would be removed
            file.parent.mkdir(exist_ok=True)
            file.touch()

    def _history(self) -> list[tuple[float, float]]:
        best = self._folder.base.training.best_checkpoint
        return history(self._folder.metrics(self._trial), self._folder.conf.metric, best)

    def _write(self, **values: Any) -> None:
        self._trial = replace(self._trial, **values)
        self._folder.write(self._trial)

    def _result(self, done: bool) -> dict[str, Any]:
        return {"metric": self._trial.metric, "percent": 100 * self._trial.share, "done": done}


def share_data(folder: SweepFolder, trial: Trial) -> None:
    """Gives a trial's run the sweep's prepared data."""
    path = folder.trials_folder / trial.name
    if not (path / "prepared").exists():
        (path / "prepared").symlink_to("../../data/prepared")
    if not (path / RUN).exists():
        done = RunFolder(folder.path / "data").lineage()["stages"]
        write_json(path / RUN, {"stages": {"prepare": done["prepare"]}})


def validate_every(folder: SweepFolder, trial: Trial, cpus: int) -> int:
    """Returns the steps between a trial's validations: the conf's, or derived from the sweep's number of
    validations."""
    conf = folder.trial_conf(trial, cpus, None)
    if folder.base.training.validate_every:
        return folder.base.training.validate_every
    prepared = folder.path / "data" / "prepared"
    config = load_config(find_base(conf.model, conf.paths))
    chosen = choose(conf, read_stats(prepared), width_of(config), has_experts(config)).conf
    _, steps = plan_steps(chosen, lengths_of(open_split(prepared, "train")))
    return max(1, round(steps / folder.conf.validations))


def _words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error) if isinstance(error, LlmRayError) else f"{type(error).__name__}: {error}"
