"""Runs trials concurrently on Ray Tune: Optuna proposes values, ASHA stops bad trials, and the sweep's folder records
them.

    slots = slots_of(conf, base, cluster)
    search(folder, slots, run_finetune, reporter)

Tune's own state is discarded: a resumed sweep reads the trials' records, which are complete after any crash.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llm_ray.cluster import Cluster, environment
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.sweep import SweepConf
from llm_ray.errors import ClusterError, Stopped, TrainError
from llm_ray.files import remove_folder
from llm_ray.progress import Bar, Reporter, duration
from llm_ray.sweep import space
from llm_ray.sweep.folder import ENDED, SweepFolder, Trial, best_of
from llm_ray.sweep.trial import Finetune, Task, TuneTrial
from llm_ray.train.task import worker_environment

MOST_AT_ONCE = 4
"""Concurrent trials if neither their number nor their cores are given."""
_PROPOSALS = 20  # attempts to propose new values
_NOTE_SECONDS = 5.0  # between updates of the sweep's running time
# Turns off Ray Tune's own files for each trial, its change of the working directory, and its output about both.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Slots:
    """Number of concurrent trials, workers per trial, and CPUs per worker."""

    trials: int
    workers: int
    cpus: int


def slots_of(conf: SweepConf, base: FinetuneConf, cluster: Cluster) -> Slots:
    """Divides the CPUs among trials. Raises ClusterError if there is no room for a single trial."""
    nodes = list(cluster.of(base.runtime.hosts).node_cpus.values())
    total = min(sum(nodes), conf.cpus or sum(nodes))
    workers = base.runtime.workers

    def room(cpus: int) -> int:
        """Returns the number of trials that fit with so many CPUs per worker."""
        return min(sum(node // cpus for node in nodes), total // cpus) // workers

    if base.runtime.cpus_per_worker == "auto":
        wanted = (
            min(conf.trials, max(1, total // workers), MOST_AT_ONCE) if conf.concurrent == "auto" else conf.concurrent
        )
        per_worker = next((cpus for cpus in range(total // (wanted * workers), 0, -1) if room(cpus) >= wanted), 1)
    else:
        per_worker = base.runtime.cpus_per_worker
        wanted = room(per_worker) if conf.concurrent == "auto" else conf.concurrent
    if not wanted or room(per_worker) < wanted:
        raise ClusterError(
            f"{max(1, wanted)} trial(s) at once with {workers} worker(s) of {per_worker} CPU(s) each need "
            f"{max(1, wanted) * workers * per_worker} CPUs, but there are {total}"
            f"{' (cpus)' if conf.cpus and conf.cpus < sum(nodes) else ''}: lower concurrent, or runtime.workers or "
            "runtime.cpus_per_worker of the finetune"
        )
    return Slots(min(wanted, conf.trials), workers, per_worker)


def search(folder: SweepFolder, slots: Slots, finetune: Finetune, reporter: Reporter) -> None:
    """Runs the missing trials on the connected Ray and resumes interrupted ones. Ctrl-C or the end of `hours` stops
    running trials with a checkpoint.

    Raises Stopped on Ctrl-C, TrainError if all trials have failed.
    """
    conf = folder.conf
    before = folder.trials()
    ended = [trial for trial in before if trial.state in ENDED]
    missing = wanted_trials(conf) - len(ended)
    used = folder.notes().get("seconds", 0.0)
    if missing > 0 and not _over(conf, used):
        fit = _Fit(lambda: _tune(folder, slots, finetune, missing))
        _follow(folder, fit, ended, used, reporter)
    trials = folder.trials()
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed and best_of(trials, conf.goal) is None:
        raise TrainError(
            f"all {len(failed)} trial(s) of {conf.name} that ended have failed. The first: {failed[0].reason}"
        )


def wanted_trials(conf: SweepConf) -> int:
    """Returns the total number of trials of a sweep."""
    return min(conf.trials, conf.combinations or conf.trials)


def _over(conf: SweepConf, seconds: float) -> bool:
    return conf.hours is not None and seconds >= 3600 * conf.hours


class _Fit(threading.Thread):
    """Runs Tune in a thread; the main thread handles progress and Ctrl-C."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="ray-tune-fit")
        self._work = work
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # reraised in the main thread
            self.error = error
        finally:
            self.ended.set()


def _follow(folder: SweepFolder, fit: _Fit, ended: list[Trial], used: float, reporter: Reporter) -> None:
    """Reports progress and ended trials; asks trials to stop on Ctrl-C or at the end of `hours`."""
    conf = folder.conf
    known = {trial.number for trial in ended}
    began = noted = time.monotonic()
    interrupted = over = False
    with reporter.bar("trials", wanted_trials(conf)) as bar:
        while True:
            try:
                finished = fit.ended.wait(0.5)
                trials = folder.trials()
                for trial in trials:
                    if trial.state in ENDED and trial.number not in known:
                        known.add(trial.number)
                        reporter.line(f"  {describe_trial(conf, trial)}")
                        forget_weights(folder, trials)
                _show(bar, conf, trials)
                now = time.monotonic()
                if now - noted > _NOTE_SECONDS or finished:
                    folder.note(seconds=used + now - began)
                    noted = now
                if finished:
                    break
                if not over and _over(conf, used + now - began):
                    over = True
                    folder.stop_file.touch()
                    reporter.line(f"The sweep's {conf.hours:g} hours are over: stopping its trials with a checkpoint …")
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                folder.stop_file.touch()
                reporter.line("Stopping the trials after this step, with a checkpoint (Ctrl-C again: immediately) …")
    folder.stop_file.unlink(missing_ok=True)
    if interrupted:
        raise Stopped(
            f"{conf.name}: stopped as requested. Run the same command to continue; trials that ended are kept."
        )
    if fit.error is not None:
        first = next(iter(str(fit.error).splitlines()), type(fit.error).__name__)
        raise TrainError(
            f"Ray Tune failed: {first}. Trials that ended are kept: run the same command to continue"
        ) from fit.error
    if lost := [trial for trial in folder.trials() if trial.state == "begun" and not over]:
        raise TrainError(
            f"{', '.join(trial.name for trial in lost)} lost their processes (out of memory, or a lost host). Trials that "
            "ended are kept: run the same command to continue, with a lower concurrent if it was memory"
        )


def _show(bar: Bar, conf: SweepConf, trials: list[Trial]) -> None:
    done = sum(trial.state in ENDED for trial in trials)
    text = ", ".join(f"{trial.name} {trial.share:.0%}" for trial in trials if trial.state == "begun")
    best = best_of(trials, conf.goal)
    bar.update(done, wanted_trials(conf), text + (f"; best {conf.metric} {best.metric:.4f}" if best else ""))


def describe_trial(conf: SweepConf, trial: Trial) -> str:
    """Returns a one-line summary of an ended trial."""
    values = ", ".join(f"{key.rpartition('.')[2]} {show_value(value)}" for key, value in trial.values.items())
    came = f"{conf.metric} {trial.metric:.4f}" if trial.metric is not None else "no result"
    reason = f" ({trial.reason})" if trial.reason else ""
    return f"{trial.name} {trial.state} in {duration(trial.seconds)}: {came} with {values}{reason}"


def show_value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def forget_weights(folder: SweepFolder, trials: list[Trial]) -> None:
    """Deletes the checkpoints of ended trials that are not the best: those of full finetunes would fill the disk."""
    best = best_of(trials, folder.conf.goal)
    for trial in trials:
        checkpoints = folder.trials_folder / trial.name / "checkpoint"
        if trial.state in ENDED and best and trial.number != best.number and checkpoints.exists():
            with contextlib.suppress(OSError):  # retried after the next trial
                remove_folder(checkpoints)


# In Tune's thread -----------------------------------------------------------------------------------------------------


def _tune(folder: SweepFolder, slots: Slots, finetune: Finetune, missing: int) -> None:
    from ray import tune

    conf = folder.conf
    task = Task(
        conf=conf.model_dump(mode="json"),
        base=folder.base.model_dump(mode="json"),
        cpus=slots.cpus,
        environment=worker_environment(),
        finetune=finetune,
    )
    # The trial itself needs no CPU. Ray rejects requests of only zeros, so it requests a bit of the head's marker
    # resource.
    resources = tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])
    with _quiet(), environment(_QUIET), tempfile.TemporaryDirectory(prefix="llm-ray-tune-") as storage:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(TuneTrial, task=task), resources),
            tune_config=tune.TuneConfig(
                num_samples=missing,
                max_concurrent_trials=slots.trials,
                search_alg=make_searcher(folder),
                scheduler=make_scheduler(folder),
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name=conf.name,
                storage_path=storage,
                verbose=0,
                stop=_stopper(folder),
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failures are in the trial's record
    try:
        yield
    finally:
        logger.setLevel(level)


def _stopper(folder: SweepFolder) -> Any:
    from ray.tune import Stopper

    file = folder.stop_file

    class Asked(Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return file.exists()

    return Asked()


def make_searcher(folder: SweepFolder) -> Any:
    """Returns Optuna's searcher; each proposal contains its trial's number. It knows the results of ended trials,
    proposes interrupted ones first, and enumerates all combinations if they are no more than the sweep's trials."""
    from ray.tune.search.optuna import OptunaSearch

    conf, trials = folder.conf, folder.trials()
    ended = [trial for trial in trials if trial.state in ENDED]
    again = [trial for trial in trials if trial.state not in ENDED]

    class Proposals(OptunaSearch):
        def suggest(self, trial_id: str) -> dict[str, Any] | None:
            if again:
                super().suggest(trial_id)  # queued below in the same order
                return {"trial": again.pop(0).number}
            values: dict[str, Any] = {}
            known = [trial.values for trial in folder.trials()]
            for _ in range(_PROPOSALS):
                values = space.from_optuna(conf, super().suggest(trial_id))
                if values not in known:
                    break
                self._ot_study.tell(self._ot_trials.pop(trial_id), state=_pruned())
            else:
                values = space.from_optuna(conf, super().suggest(trial_id))
            return {"trial": folder.propose(values).number}

    searcher = Proposals(
        space.distributions(conf), metric="metric", mode=conf.goal, sampler=space.sampler(conf, len(trials))
    )
    for trial in ended:
        failed = trial.metric is None
        searcher.add_evaluated_point(space.to_optuna(conf, trial.values), trial.metric, error=failed)
    for trial in again:
        searcher._ot_study.enqueue_trial(space.to_optuna(conf, trial.values))
    if conf.combinations is not None and conf.combinations <= conf.trials:
        tried = [trial.values for trial in trials]
        for values in conf.grid():
            if values not in tried:
                searcher._ot_study.enqueue_trial(space.to_optuna(conf, values))
    return searcher


def _pruned() -> Any:
    from optuna.trial import TrialState

    return TrialState.PRUNED


def make_scheduler(folder: SweepFolder) -> Any:
    """Returns ASHA over the share of training that a trial has completed, with the results of earlier trials; FIFO if
    disabled."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    conf = folder.conf
    if not conf.asha.enabled:
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr="percent",
        metric="metric",
        mode=conf.goal,
        max_t=100,
        grace_period=100 * conf.asha.grace,
        reduction_factor=conf.asha.reduction,
    )
    for trial in folder.trials():
        if trial.state in ("done", "stopped"):
            known = types.SimpleNamespace(trial_id=trial.name, stub=False)
            scheduler.on_trial_add(None, known)
            for share, value in trial.history:
                if math.isfinite(value):
                    scheduler.on_trial_result(None, known, {"percent": 100 * share, "metric": value})
    return scheduler
