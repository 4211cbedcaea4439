"""Plan or run a sweep: data prepared once, trials side by side, the best one judged on rows that none of them saw, and
exported.

conf = load_sweep("lora", ["train=tickets.jsonl"])
plan = plan_sweep(conf, base, reporter)
report = run_sweep(conf, base, reporter)
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from llm_ray.app.finetune import PlanReport, report_plan, run_finetune, stage_inputs
from llm_ray.cluster import Cluster, environment, host_cluster, ray_session
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.load import dump
from llm_ray.conf.sweep import SweepConf
from llm_ray.data.prepare import evaluated_split, has_validation
from llm_ray.errors import DataError, RunError
from llm_ray.evaluate.tasks import look_at_tasks
from llm_ray.files import remove_folder, write_text
from llm_ray.models.convert import check_environment
from llm_ray.models.load import find_base
from llm_ray.progress import Reporter, duration
from llm_ray.runs.folder import CONF, RUN, RunFolder, locked_run
from llm_ray.sweep.folder import ENDED, SweepFolder, Trial, best_of
from llm_ray.sweep.report import Report, make_report, terminal_curves, write_report
from llm_ray.sweep.search import Slots, search, slots_of, wanted_trials

__all__ = ["Report", "SweepPlan", "draw_curves", "plan_sweep", "run_sweep", "sweep_folder"]

_OF_THE_RUN = ("checkpoint", "tensorboard", "metrics.jsonl", "params.json", "result.json")
"""What a trial's run hands over to the run that the best one becomes."""
_MADE_LATER = ("output", "evaluation.md", "answers.jsonl", "prepared", *_OF_THE_RUN, CONF, RUN)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is going to do: the trials at once and their cores, and a trial's plan."""

    slots: Slots
    trials: int
    trial: PlanReport
    seconds: float | None
    """Of all trials, if each trained to its end; None where a trial's could not be measured."""
    memory: float
    """Peak, in bytes, of the trials at once on this host."""

    def lines(self, conf: SweepConf) -> list[str]:
        """The figures for people, a line each."""
        each = f"{self.slots.workers} worker(s) with {self.slots.cpus} CPU(s)"
        lines = [f"{self.trials} trials, {self.slots.trials} at once, each with {each}"]
        if self.seconds is not None and self.trial.seconds is not None:
            rounds = f"a trial about {duration(self.trial.seconds)} with the finetune's own values"
            limit = f", at most {conf.hours:g} h (hours)" if conf.hours else ""
            less = ", less by what asha stops" if conf.asha.enabled else ""
            lines.append(f"{rounds}, all of them about {duration(self.seconds)}{less}{limit}")
        gib = self.memory / 2**30, self.trial.memory_here / 2**30
        fits = "" if gib[0] < gib[1] else ": TOO MUCH for this host; lower concurrent"
        return [*lines, f"memory about {gib[0]:.1f} GiB for trials at once; this host has {gib[1]:.1f} GiB{fits}"]


def plan_sweep(conf: SweepConf, base: FinetuneConf, reporter: Reporter) -> SweepPlan:
    """Read the data and take some steps of one trial, without a run and without Ray (but to ask a cluster what it has).
    Raises LlmRayError for what would fail."""
    folder = SweepFolder(conf, base)
    look_at_tasks(base, reporter)
    slots = slots_of(conf, base, _cluster(base))
    runtime = base.runtime.model_copy(update={"cpus_per_worker": slots.cpus})
    trial = report_plan(folder.base.model_copy(update={"runtime": runtime}), reporter)
    trials = wanted_trials(conf)
    rounds = -(-trials // slots.trials)
    seconds = None if trial.seconds is None else trial.seconds * rounds
    return SweepPlan(slots, trials, trial, seconds, trial.memory * slots.trials)


def _cluster(base: FinetuneConf) -> Cluster:
    if base.runtime.mode == "local":
        return host_cluster()
    with ray_session(base.runtime) as cluster:
        return cluster


def run_sweep(conf: SweepConf, base: FinetuneConf, reporter: Reporter, *, force: bool = False) -> Report:
    """Make the trials that are missing, choose the best, judge it on the held-out rows and export it.

    `base`: the finetune (`load.finetune_of`). `force` starts over, without the trials that there are. Raises LlmRayError:
    Stopped where Ctrl-C ended the search; the same call goes on.
    """
    folder = SweepFolder(conf, base)
    if base.runtime.mode == "local":
        slots_of(conf, base, host_cluster())  # before the data are read
    if "convert" in base.stages:
        check_environment()
    for line in look_at_tasks(base, reporter):  # the best trial's model is evaluated, whatever the stages
        reporter.line(line)
    folder.refuse_run()
    if force and folder.path.exists():
        with locked_run(folder.path):
            remove_folder(folder.path)
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked_run(folder.path):
        folder.begin()
        _prepare(folder, reporter)
        _search(folder, reporter)
        best = best_of(folder.trials(), conf.goal)
        if best is None:
            raise RunError(f"{conf.name}: its hours were over before a trial was validated: raise hours")
        write_report(folder, make_report(folder))
        _promote(folder, best, reporter)
        run_finetune(folder.best_conf(best), reporter)
        evaluated = RunFolder(folder.run).result().get("evaluation", {})
        report = make_report(folder, {which: evaluated.get(which, {}) for which in ("base", "finetuned")})
        write_report(folder, report)
        return report


def _prepare(folder: SweepFolder, reporter: Reporter) -> None:
    """The data of all trials. Raises DataError where they have no validation rows, RunError where they are not those of
    the trials that there are."""
    conf = folder.data_conf
    inputs = stage_inputs(conf, find_base(conf.model, conf.paths))["prepare"]
    if folder.notes().get("prepared", inputs) != inputs:
        raise RunError(
            f"the data or the model of the sweep {folder.conf.name} have changed since its trials were made: use another "
            "name (--set name=…), or --force to start over"
        )
    run_finetune(conf, reporter)
    if not has_validation(conf.run_dir / "prepared"):
        raise DataError(
            "trials are compared on validation rows, but data.validation of the finetune leaves none: set it to a fraction, "
            "as in set: {data.validation: 0.1}"
        )
    assert evaluated_split(conf.run_dir / "prepared") == "test"  # noqa: S101 (every sweep's conf has data.test)
    folder.note(prepared=inputs)


def _search(folder: SweepFolder, reporter: Reporter) -> None:
    conf = folder.conf
    ended = sum(trial.state in ENDED for trial in folder.trials())
    wanted = wanted_trials(conf)
    reporter.line("trials …", kind="heading")
    if ended:
        reporter.line(f"  {ended} of {wanted} trials ended before and are kept")
    if ended >= wanted:
        return
    # Ray would log a trial's error, which its record holds, when it drops the result.
    with environment({"RAY_IGNORE_UNHANDLED_ERRORS": "1"}), ray_session(folder.base.runtime) as cluster:
        slots = slots_of(conf, folder.base, cluster)
        each = f"{slots.workers} worker(s) with {slots.cpus} CPU(s)"
        reporter.line(f"  {wanted - ended} trials to make, {slots.trials} at once, each with {each}")
        search(folder, slots, run_finetune, reporter)


def _promote(folder: SweepFolder, best: Trial, reporter: Reporter) -> None:
    """Make the best trial's run the sweep's own, whole or not at all: stages prepare and train are done in it."""
    conf, metric = folder.best_conf(best), f"{folder.conf.metric} {best.metric:.4f}"
    reporter.line(f"best: {best.name}, {metric} on the validation rows, by which it was chosen", kind="heading")
    write_text(folder.path / "best.yaml", dump(conf))
    if folder.notes().get("best") == best.number and (folder.run / RUN).exists():
        return
    (folder.run / RUN).unlink(missing_ok=True)  # no run until it is whole
    for name in _MADE_LATER:
        path = folder.run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    trial = folder.trials_folder / best.name
    shutil.copytree(folder.path / "data" / "prepared", folder.run / "prepared")
    for name in _OF_THE_RUN:
        path = trial / name
        if path.is_dir():
            shutil.copytree(path, folder.run / name)
        elif path.exists():
            shutil.copy2(path, folder.run / name)
    folder.note(best=best.number)
    lineage = RunFolder(trial).lineage()
    RunFolder(folder.run).record(created=lineage["created"], stages=lineage["stages"], sweep=best.name)


def sweep_folder(conf: SweepConf, base: FinetuneConf) -> Path:
    """Where the sweep's tables and plots are."""
    return SweepFolder(conf, base).path


def draw_curves(conf: SweepConf, base: FinetuneConf, report: Report, width: int, color: bool) -> str:
    """The curves of the best trials for a terminal, `width` characters wide; empty without any."""
    return terminal_curves(SweepFolder(conf, base), report, width, color)
