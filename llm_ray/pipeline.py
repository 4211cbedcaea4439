"""A finetune from conf to model: the stages in order, each skipped when it is done for the same inputs.

run_finetune(load_finetune("quickstart"))
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from llm_ray.cluster import Cluster, check_resources, ray_session
from llm_ray.conf.schema import STAGES, FinetuneConf, Stage
from llm_ray.console import Reporter
from llm_ray.data.prepare import prepare
from llm_ray.errors import RunError
from llm_ray.models.convert import check_environment, convert_model, converted
from llm_ray.models.load import check_model, identity, load_tokenizer
from llm_ray.runs.folder import RunFolder, file_hashes, inputs_hash, open_run

Resume = Literal["auto", "no"] | Path


def run_finetune(conf: FinetuneConf, *, force: bool = False, resume: Resume = "auto", reporter: Reporter | None = None) -> Path:
    """Run the conf's stages; returns the run's folder.

    `force` repeats stages that are done. `resume`: `auto` trains on from the run's last whole checkpoint, `no` from the start, a
    path from that checkpoint; checkpoints that are not gone on from are moved aside. Raises LlmRayError (Stopped after Ctrl-C).
    """
    reporter = reporter or Reporter()
    with open_run(conf, force=force) as run:
        _run_stages(conf, run, force, resume, reporter)
    return conf.run_dir


def _run_stages(conf: FinetuneConf, run: RunFolder, force: bool, resume: Resume, reporter: Reporter) -> None:
    inputs = _inputs(conf)
    due = [stage for stage in STAGES if stage in conf.stages and (force or not run.is_done(stage, inputs[stage]))]
    for stage in (s for s in STAGES if s in conf.stages and s not in due):
        reporter.line(f"{stage}: done before with the same inputs, skipped (--force repeats it)")
    with contextlib.ExitStack() as stack:
        cluster: Cluster | None = None
        if due:
            check_model(conf.model, conf.paths)  # before hours of preparation, not after
        if "convert" in due:
            check_environment()
        if set(due) - {"prepare", "convert"}:
            cluster = stack.enter_context(ray_session(conf.runtime))
            check_resources(conf.runtime, cluster)
            run.record(hosts=cluster.hosts)
        for stage in due:
            _check_order(stage, conf, run, inputs)
            reporter.line(f"{stage} …", style="bold")
            same = run.begin(stage, inputs[stage])
            began = time.perf_counter()
            if stage == "prepare":
                _prepare(conf, run, reporter)
            elif stage == "convert":
                _convert(conf, force, reporter)
            elif cluster is not None:
                if stage == "train":
                    _train(conf, run, cluster, resume if resume != "auto" or (same and not force) else "no", reporter)
                elif stage == "evaluate":
                    _evaluate(conf, run, cluster, reporter)
                else:
                    _export(conf, run, cluster, reporter)
            seconds = time.perf_counter() - began
            run.mark_done(stage, inputs[stage], seconds)
            reporter.line(f"{stage}: done in {seconds:.0f} s")


def _inputs(conf: FinetuneConf) -> dict[Stage, str]:
    """For each stage, a hash of all that its result depends on."""
    held_out = conf.data.validation if isinstance(conf.data.validation, tuple) else ()
    files = file_hashes([*conf.data.train, *held_out])
    prepared = inputs_hash(conf.data, files, conf.tuning.objective, conf.training.seed, conf.model, identity(conf.model, conf.paths))
    trained = inputs_hash(prepared, conf.tuning, conf.training, conf.runtime.workers)
    evaluated = inputs_hash(trained, conf.evaluation, file_hashes(conf.evaluation.data or ()))
    return {
        "prepare": prepared,
        "train": trained,
        "evaluate": evaluated,
        "export": inputs_hash(trained, evaluated if "evaluate" in conf.stages else ""),
        "convert": inputs_hash(trained, conf.convert),
    }


def _check_order(stage: Stage, conf: FinetuneConf, run: RunFolder, inputs: dict[Stage, str]) -> None:
    needed: dict[Stage, Stage] = {"train": "prepare", "evaluate": "train", "export": "train", "convert": "export"}
    before = needed.get(stage)
    # The model card's figures make another export of the same weights.
    evaluated = stage == "convert" and run.is_done("export", inputs_hash(inputs["train"], inputs["evaluate"]))
    if before and not evaluated and not run.is_done(before, inputs[before]):
        raise RunError(
            f"stage {stage} of {conf.name} needs stage {before}, which is not done for this conf: add it to stages ({', '.join([before, *conf.stages])})"
        )


def _prepare(conf: FinetuneConf, run: RunFolder, reporter: Reporter) -> None:
    stats = prepare(conf, load_tokenizer(conf.model, conf.paths), conf.run_dir / "prepared", lambda text: reporter.line(f"  {text}"))
    run.update_result("data", stats.model_dump(mode="json"))
    for line in stats.lines():
        reporter.line(f"  {line}")


def _train(conf: FinetuneConf, run: RunFolder, cluster: Cluster, resume: Resume, reporter: Reporter) -> None:
    from llm_ray.train.launch import run_training
    from llm_ray.train.plan import describe_plan

    initial = _starting_point(conf.run_dir / "checkpoint", resume, reporter)
    params, lines = describe_plan(conf, check_resources(conf.runtime, cluster))
    run.write_params(params)
    for line in lines:
        reporter.line(f"  {line}")
    outcome = run_training(conf, cluster, initial, reporter)
    run.update_result("training", {**outcome, **_training_figures(conf.run_dir / "metrics.jsonl")})
    if outcome["reason"]:
        reporter.line(f"  {outcome['reason']}")


def _evaluate(conf: FinetuneConf, run: RunFolder, cluster: Cluster, reporter: Reporter) -> None:
    from llm_ray.evaluate.stage import evaluate
    from llm_ray.train.trained import final_checkpoint

    figures = evaluate(conf, cluster, final_checkpoint(conf), reporter)
    run.update_result("evaluation", figures)
    for key, before in figures["base"].items():
        reporter.line(f"  {key.replace('_', ' ')}: base {before:.3f}, finetuned {figures['finetuned'][key]:.3f}")


def _export(conf: FinetuneConf, run: RunFolder, cluster: Cluster, reporter: Reporter) -> None:
    from llm_ray.export.stage import export
    from llm_ray.runs.card import model_card
    from llm_ray.train.trained import final_checkpoint

    output = export(conf, cluster, final_checkpoint(conf), model_card(conf, run.lineage(), run.result()), reporter)
    reporter.line(f"  the model is in {output}")


def _convert(conf: FinetuneConf, force: bool, reporter: Reporter) -> None:
    output, weights = conf.run_dir / "output", conf.convert.weights
    folder = convert_model(output, converted(output, weights, conf.paths.models), weights, reporter, force=force)
    reporter.line(f"  the model with {weights} weights is in {folder}")


def _starting_point(folder: Path, resume: Resume, reporter: Reporter) -> Path | None:
    """Make the checkpoint folder hold only what is gone on from; returns a checkpoint outside it to begin with, if so asked."""
    from llm_ray.train.checkpoint import BEST, list_checkpoints, step_of

    own = list_checkpoints(folder)
    if resume == "auto":
        if own:
            reporter.line(f"  going on from the checkpoint of step {step_of(own[-1])}")
        return None
    wanted: Path | None = None
    if isinstance(resume, Path):
        wanted = resume.absolute()
        if not (wanted / ".metadata").is_file():
            raise RunError(f"--resume {resume}: there is no whole checkpoint; this run's are {', '.join(str(p) for p in own) or 'none'}")
        reporter.line(f"  going on from {wanted} (step {step_of(wanted)})")
    newer = [p for p in own if wanted is None or wanted.parent != folder.absolute() or step_of(p) > step_of(wanted)]
    if newer:
        aside = folder.with_name(f"checkpoint.{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir()
        for path in [*newer, *([folder / BEST] if (folder / BEST).exists() else [])]:
            path.rename(aside / path.name)
        reporter.line(f"  {len(newer)} checkpoint(s) that are not gone on from were moved to {aside}")
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
