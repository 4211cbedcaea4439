"""Plans or runs a finetune, from conf to model: the stages in order, skipping those already done with the same inputs.

conf = load_finetune("quickstart")
plan = plan_finetune(conf, reporter)
folder = run_finetune(conf, reporter)     # another process stops it with llm_ray.app.runs.stop_run
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_ray.cluster import Workers, fit_workers, host_cluster, ray_session
from llm_ray.conf.finetune import STAGES, FinetuneConf, Stage
from llm_ray.conf.objectives import OBJECTIVES
from llm_ray.data.formats import Conversation
from llm_ray.data.prepare import FORM, DataStats, evaluation_rows, largest_token, prepare, read_stats
from llm_ray.data.processors import code_of
from llm_ray.errors import ModelError, RunError, Stopped
from llm_ray.evaluate.tasks import TASK_KEYS, look_at_tasks, task_inputs
from llm_ray.models.convert import check_environment, convert_model, converted, size_on_disk
from llm_ray.models.load import (
    Base,
    check_model,
    find_base,
    has_experts,
    identity,
    load_config,
    load_tokenizer,
    tokenizer_files,
    width_of,
)
from llm_ray.progress import Reporter
from llm_ray.runs.benchmarks import benchmark_lines
from llm_ray.runs.folder import RunFolder, file_hashes, inputs_hash, open_run, stop_file
from llm_ray.train.auto import RULES, choose
from llm_ray.train.fits import check_fits, with_fewer_weights

if TYPE_CHECKING:
    from llm_ray.train.auto import Choice
    from llm_ray.train.estimate import Estimate

Resume = Literal["auto", "no"] | Path


@dataclass(frozen=True)
class Plan:
    """A finetune's plan: data, values chosen for `auto`, estimated cost, and warnings."""

    data: DataStats
    choice: Choice
    estimate: Estimate
    warnings: list[str]
    notes: list[str]
    """What will be corrected automatically."""
    converted_bytes: int | None
    """Approximate disk size of the OpenVINO model in bytes; None without stage convert."""


def plan_finetune(conf: FinetuneConf, reporter: Reporter) -> Plan:
    """Reads the data and runs some training steps. Creates no run, and uses Ray only to query a cluster's resources.

    Raises LlmRayError for whatever would make the finetune fail.
    """
    from llm_ray.train.estimate import estimate

    base = find_base(conf.model, conf.paths)
    check_model(base)
    notes = look_ahead(conf, base, conf.stages, reporter)
    if "convert" in conf.stages:
        check_environment()
    if conf.runtime.mode == "local":
        workers = fit_workers(conf.runtime, host_cluster())
    else:
        with ray_session(conf.runtime) as cluster:
            workers = fit_workers(conf.runtime, cluster)
    with tempfile.TemporaryDirectory(prefix="llm-ray-plan-") as folder:
        prepared = Path(folder) / "prepared"
        data = prepare(conf, load_tokenizer(base), prepared, reporter.line)
        choice = _choose(conf, base, prepared)
        if "train" in conf.stages:
            reporter.line("Running some steps to measure their cost …")
        guess = estimate(choice.conf, base, data, prepared, workers.cpus)
        size = size_on_disk(guess.parameters, conf.convert.weights) if "convert" in conf.stages else None
        return Plan(data, choice, guess, _warnings(choice.conf, base, prepared, guess.steps), notes, size)


@dataclass(frozen=True)
class PlanReport:
    """A plan in plain values, for display. `conf` contains the values chosen for `auto`; `sections` are lines by
    title."""

    conf: FinetuneConf
    sections: dict[str, list[str]]
    memory: float
    """Peak memory of all workers on this host, in bytes."""
    memory_here: float
    seconds: float | None
    """Training time; None if it could not be measured."""
    fits: bool
    advice: list[str]
    """Changes that would make the finetune fit; empty if it fits."""


def report_plan(conf: FinetuneConf, reporter: Reporter) -> PlanReport:
    """Like `plan_finetune`, but returns values that can be sent to another process."""
    plan = plan_finetune(conf, reporter)
    guess, chosen = plan.estimate, plan.choice.conf
    sections = {
        "Data": plan.data.lines(),
        "Chosen": plan.choice.lines(),
        "What learns": guess.learning,
        "Estimate": [*guess.lines(chosen), *plan.notes],
        "Warnings": plan.warnings,
    }
    return PlanReport(
        chosen,
        sections,
        guess.memory(chosen),
        guess.memory_here,
        guess.seconds,
        guess.fits(chosen),
        [] if guess.fits(chosen) else _smaller(chosen, guess),
    )


def _smaller(conf: FinetuneConf, guess: Estimate) -> list[str]:
    """Returns changes that would make a finetune fit."""
    ways = []
    if not conf.training.gradient_checkpointing:
        ways.append("training.gradient_checkpointing true: less memory, about a third slower")
    if (conf.training.micro_batch_tokens or 4096) > conf.data.max_length:
        ways.append(f"training.micro_batch_tokens {conf.data.max_length}: fewer tokens at once")
    return [*ways, *with_fewer_weights(conf, guess.memory_per_worker, guess.memory_here)]


def run_finetune(
    conf: FinetuneConf,
    reporter: Reporter,
    *,
    force: bool = False,
    resume: Resume = "auto",
    workers: Workers | None = None,
) -> Path:
    """Runs the conf's stages; returns the run's folder.

    `force` repeats finished stages. `resume` is `auto` (continue from the run's last complete checkpoint), `no` (start
    over) or the path of a checkpoint; abandoned checkpoints are moved aside. `workers`: those to use if this process is
    connected to Ray already. Raises LlmRayError, in particular Stopped if `stop_run`, or Ctrl-C during training, ended
    the run.
    """
    base = find_base(conf.model, conf.paths)
    with open_run(conf, base, force=force) as run:
        _run_stages(conf, base, run, force, resume, workers, reporter)
    return conf.run_dir


def _run_stages(
    conf: FinetuneConf,
    base: Base,
    run: RunFolder,
    force: bool,
    resume: Resume,
    workers: Workers | None,
    reporter: Reporter,
) -> None:
    inputs = stage_inputs(conf, base)
    due = [stage for stage in STAGES if stage in conf.stages and (force or not run.is_done(stage, inputs[stage]))]
    for stage in (s for s in STAGES if s in conf.stages and s not in due):
        reporter.line(f"{stage}: already done with the same inputs, skipped (--force repeats it)")
    with contextlib.ExitStack() as stack:
        if due:
            check_model(base)  # fail before hours of preparation
        if "train" in due:
            check_fits(conf, base)
        for line in look_ahead(conf, base, due, reporter):
            reporter.line(line)
        if "convert" in due:
            check_environment()
        if set(due) - {"prepare", "convert"}:
            if workers is None:
                workers = fit_workers(conf.runtime, stack.enter_context(ray_session(conf.runtime)))
            run.record(hosts=workers.cluster.hosts)
        choice: Choice | None = None
        for stage in due:
            if stop_file(run.path).exists():
                raise Stopped(
                    f"{conf.name}: stopped before stage {stage} as requested. Run the same command to continue from "
                    "there."
                )
            _check_order(stage, conf, run, inputs)
            if choice is None and stage not in ("prepare", "convert"):
                choice = _choose(conf, base, conf.run_dir / "prepared")
            reporter.line(f"{stage} …", kind="heading")
            same = run.begin(stage, inputs[stage])
            began = time.perf_counter()
            if stage == "prepare":
                _prepare(conf, base, run, reporter)
            elif stage == "convert":
                _convert(conf, force, reporter)
            elif workers is not None and choice is not None:
                if stage == "train":
                    again = resume if resume != "auto" or (same and not force) else "no"
                    _train(choice, base, run, workers, again, reporter)
                elif stage == "evaluate":
                    _evaluate(choice.conf, base, run, workers, force, reporter)
                else:
                    _export(choice.conf, base, run, workers, reporter)
            seconds = time.perf_counter() - began
            run.mark_done(stage, inputs[stage], seconds)
            reporter.line(f"{stage}: done in {seconds:.0f} s")
    if {"train", "evaluate"} & set(due):
        _judge(conf, run, reporter)


def look_ahead(conf: FinetuneConf, base: Base, due: Sequence[Stage], reporter: Reporter) -> list[str]:
    """Raises LlmRayError for problems that would make a later stage fail after hours of training; returns notes for the
    user."""
    if "evaluate" in due and conf.evaluation.data:
        from llm_ray.evaluate.stage import questions

        questions(conf, base)
    notes = []
    if "evaluate" in due:
        notes += look_at_tasks(conf, reporter)
    if {"train", "export"} & set(due):
        from llm_ray.export.check import rehearse

        notes += rehearse(conf, base)
    return notes


def stage_inputs(conf: FinetuneConf, base: Base) -> dict[Stage, str]:
    """Returns a hash per stage of everything that its result depends on."""
    held_out = conf.data.validation if isinstance(conf.data.validation, tuple) else ()
    files = file_hashes([*conf.data.train, *held_out])
    model = [conf.model, identity(base), file_hashes(tokenizer_files(base))]
    prepared = inputs_hash(
        FORM, conf.data, files, _processor_files(conf), conf.tuning.objective, conf.training.seed, *model
    )
    # Keys of other objectives do not affect training.
    others = {objective.section for objective in OBJECTIVES.values() if objective.section} - {conf.objective.section}
    tuning = conf.tuning.model_dump(mode="json", exclude=others)
    trained = inputs_hash(prepared, tuning, conf.training, RULES)
    # Without tasks as before there were any, so that runs of then count as evaluated.
    evaluation = conf.evaluation.model_dump(mode="json", exclude=set() if conf.evaluation.tasks else TASK_KEYS)
    evaluated = inputs_hash(
        trained, evaluation, file_hashes(conf.evaluation.data or ()), *task_inputs(conf.evaluation.tasks)
    )
    return {
        "prepare": prepared,
        "train": trained,
        "evaluate": evaluated,
        "export": inputs_hash(trained, evaluated if "evaluate" in conf.stages else ""),
        "convert": inputs_hash(trained, conf.convert),
    }


def _processor_files(conf: FinetuneConf) -> list[dict[str, Any]]:
    """Returns hashes of the processor's code and of the files named in its arguments."""
    if not conf.data.processor:
        return []
    named = [Path(value).expanduser() for value in texts(conf.data.processor_args)]
    return file_hashes([*code_of(conf.data.processor), *(path for path in named if _is_file(path))])


def texts(value: object) -> list[str]:
    """Returns all strings in a conf value, at any depth."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in inner for text in texts(part)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the text cannot be a path
        return False


def _check_order(stage: Stage, conf: FinetuneConf, run: RunFolder, inputs: dict[Stage, str]) -> None:
    needed: dict[Stage, Stage] = {"train": "prepare", "evaluate": "train", "export": "train", "convert": "export"}
    before = needed.get(stage)
    # Evaluation figures change the model card, and so the export's hash, but not the weights.
    evaluated = stage == "convert" and run.is_done("export", inputs_hash(inputs["train"], inputs["evaluate"]))
    if before and not evaluated and not run.is_done(before, inputs[before]):
        raise RunError(
            f"stage {stage} of {conf.name} needs stage {before}, which has not been run for this conf: add it to "
            f"stages ({', '.join([before, *conf.stages])})"
        )


def _prepare(conf: FinetuneConf, base: Base, run: RunFolder, reporter: Reporter) -> None:
    stats = prepare(conf, load_tokenizer(base), conf.run_dir / "prepared", lambda text: reporter.line(f"  {text}"))
    run.update_result("data", stats.model_dump(mode="json"))
    for line in stats.lines():
        reporter.line(f"  {line}")


def _choose(conf: FinetuneConf, base: Base, prepared: Path) -> Choice:
    config = load_config(base)
    if vocabulary := getattr(config.get_text_config(), "vocab_size", None):
        _check_tokens(conf, base, prepared, vocabulary)
    return choose(conf, read_stats(prepared), width_of(config), has_experts(config))


def _check_tokens(conf: FinetuneConf, base: Base, prepared: Path, vocabulary: int) -> None:
    """Raises ModelError if prepared data has a token id beyond the model's embeddings."""
    largest = largest_token(prepared)
    if largest >= vocabulary:
        token = load_tokenizer(base).convert_ids_to_tokens(largest)
        raise ModelError(
            f"the tokenizer gives token {largest} ({token!r}) for a row of the data, and the model {conf.model.base} "
            f"has embeddings for {vocabulary} tokens: "
            f"{'set model.tokenizer to' if conf.model.tokenizer else 'give the model'} the tokenizer that it was "
            "trained with"
        )


def _warnings(conf: FinetuneConf, base: Base, prepared: Path, steps: int) -> list[str]:
    from llm_ray.train.plan import warnings

    asked: list[Conversation] = []
    if conf.evaluation.data and conf.evaluation.samples != 0:
        asked = list(evaluation_rows(conf, load_tokenizer(base), prepared))
    return warnings(conf, read_stats(prepared), steps, width_of(load_config(base)), asked, prepared)


def _train(choice: Choice, base: Base, run: RunFolder, workers: Workers, resume: Resume, reporter: Reporter) -> None:
    from llm_ray.train.launch import run_training
    from llm_ray.train.plan import describe_plan

    conf, prepared = choice.conf, choice.conf.run_dir / "prepared"
    initial = _starting_point(conf.run_dir / "checkpoint", resume, reporter)
    params, lines = describe_plan(choice, prepared, workers.cpus)
    params["warnings"] = _warnings(conf, base, prepared, params["max_steps"])
    run.write_params(params)
    for line in lines:
        reporter.line(f"  {line}")
    for warning in params["warnings"]:
        reporter.line(f"  warning: {warning}", kind="warning")
    outcome = run_training(conf, base, workers, initial, reporter)
    run.update_result("training", {**outcome, **_training_figures(conf.run_dir / "metrics.jsonl")})
    if outcome["reason"]:
        reporter.line(f"  {outcome['reason']}")


def _evaluate(
    conf: FinetuneConf, base: Base, run: RunFolder, workers: Workers, force: bool, reporter: Reporter
) -> None:
    from llm_ray.evaluate.stage import evaluate
    from llm_ray.train.trained import final_checkpoint

    figures = evaluate(conf, base, workers, final_checkpoint(conf), reporter, fresh=force)
    run.update_result("evaluation", figures)
    if figures["rows"]:
        reporter.line(f"  {figures['rows']} questions asked: {figures['questions']}")
    for key, after in figures["finetuned"].items():
        before = f"base {figures['base'][key]:.3f}, " if key in figures["base"] else ""
        reporter.line(f"  {key.replace('_', ' ')}: {before}finetuned {after:.3f}")
    for line in benchmark_lines(figures["tasks"]):
        reporter.line(f"  {line}")


def _judge(conf: FinetuneConf, run: RunFolder, reporter: Reporter) -> None:
    """Records in the run's result whether the model has learned, judged by its metrics, and reports reasons against
    it."""
    from llm_ray.runs.metrics import read_metrics
    from llm_ray.train.verdict import not_learned

    evaluation = run.result().get("evaluation", {}) if "evaluate" in conf.stages else {}
    found = not_learned(read_metrics(conf.run_dir / "metrics.jsonl"), evaluation, run.params())
    run.update_result("verdict", {"learned": not found, "reasons": found})
    for reason in found:
        reporter.line(f"warning: {conf.name} has not learned: {reason}", kind="warning")


def _export(conf: FinetuneConf, base: Base, run: RunFolder, workers: Workers, reporter: Reporter) -> None:
    from llm_ray.export.stage import export
    from llm_ray.runs.card import model_card
    from llm_ray.train.trained import final_checkpoint

    card = model_card(conf, base, run.lineage(), run.result())
    output = export(conf, base, workers, final_checkpoint(conf), card, reporter)
    reporter.line(f"  the model is in {output}")


def _convert(conf: FinetuneConf, force: bool, reporter: Reporter) -> None:
    output, weights = conf.run_dir / "output", conf.convert.weights
    folder = convert_model(output, converted(output, weights, conf.paths.models), weights, reporter, force=force)
    reporter.line(f"  the model with {weights} weights is in {folder}")


def _starting_point(folder: Path, resume: Resume, reporter: Reporter) -> Path | None:
    """Moves or deletes checkpoints that training does not resume from; returns the checkpoint to start from if it is
    outside the folder, else None."""
    from llm_ray.train.checkpoint import BEST, list_checkpoints, step_of

    own = list_checkpoints(folder)
    if resume == "auto":
        if own:
            reporter.line(f"  resuming from the checkpoint of step {step_of(own[-1])}")
        return None
    wanted: Path | None = None
    if isinstance(resume, Path):
        wanted = resume.absolute()
        if not (wanted / ".metadata").is_file():
            raise RunError(
                f"--resume {resume}: there is no complete checkpoint; this run has "
                f"{', '.join(str(p) for p in own) or 'none'}"
            )
        reporter.line(f"  resuming from {wanted} (step {step_of(wanted)})")
    newer = [p for p in own if wanted is None or wanted.parent != folder.absolute() or step_of(p) > step_of(wanted)]
    if newer:
        aside = folder.with_name(f"checkpoint.{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir()
        for path in [*newer, *([folder / BEST] if (folder / BEST).exists() else [])]:
            path.rename(aside / path.name)
        reporter.line(f"  {len(newer)} abandoned checkpoint(s) were moved to {aside}")
    elif wanted is None and (folder / BEST).exists():
        shutil.rmtree(folder / BEST)
    return wanted if wanted and wanted.parent != folder.absolute() else None


def _training_figures(metrics: Path) -> dict[str, Any]:
    from llm_ray.runs.metrics import read_metrics

    rows = [row for row in read_metrics(metrics) if "loss" in row]
    if not rows:
        return {}
    seconds, tokens = sum(row["seconds"] for row in rows), sum(row["tokens"] for row in rows)
    return {"loss": rows[-1]["loss"], "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
