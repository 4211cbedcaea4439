"""The screen Runs: queued and finished runs, one run in training, and several side by side."""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import gradio as gr

from llm_ray.app import jobs, serving
from llm_ray.app.runs import (
    RunDetails,
    RunSummary,
    age,
    compare_runs,
    delete_run,
    metrics,
    rate,
    seconds_left,
    show_run,
    stamp,
    stop_run,
    watch_runs,
)
from llm_ray.conf.section import Paths
from llm_ray.errors import RunError
from llm_ray.progress import duration
from llm_ray.ui import figures
from llm_ray.ui.handlers import GO, handler, on, on_load
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role
from llm_ray.ui.work import show_works

if TYPE_CHECKING:
    from llm_ray.ui.screens import Site

_BUSY, _IDLE = 2.0, 15.0
"""Seconds between two updates, while a job is active and while none is."""
_METRICS = ("loss", "validation_loss", "learning_rate", "tokens_per_second", "gradient_norm")
_LINES = 200
_NO_BUTTONS = ("", "", "", "")


def build(site: Site) -> None:
    """Creates the screen's components."""
    runs = Paths.of(site.home).runs

    def view(name: str, before: Any) -> tuple[Any, ...]:
        """Returns list, state, curves, log, buttons and timer; skips all if nothing has changed since `before`."""
        queue, known = jobs.queue(runs), watch_runs(runs)
        now = (name, stamp(runs, name) if name else (), queue, known)
        if now == before:
            return (gr.skip(),) * len(shown)
        listed = _list(known, queue)
        job = next((job for job in queue if job.name == name), None)
        busy = any(one.state != "failed" for one in queue) or any(run.state == "running" for run in known)
        state, curves, log, buttons = _one(runs, name, job) if name else ("", "", "", _NO_BUTTONS)
        return now, listed, state, curves, log, *_buttons(name, buttons), gr.Timer(_BUSY if busy else _IDLE)

    @handler(Role.VIEWER)
    def opened(visitor: Visitor, here: gr.Request) -> tuple[Any, ...]:
        name = here.query_params.get("run") or ""
        several = [one for one in (here.query_params.get("compare") or "").split(",") if one]
        names = [run.name for run in watch_runs(runs)]
        return name, gr.Dropdown(choices=names, value=[one for one in several if one in names]), *view(name, None)

    @handler(Role.VIEWER)
    def ticked(visitor: Visitor, name: str, before: Any) -> tuple[Any, ...]:
        return view(name, before)

    @handler(Role.USER)
    def stopped(visitor: Visitor, name: str) -> tuple[Any, ...]:
        if any(job.name == name and job.state in ("waiting", "failed") for job in jobs.queue(runs)):
            jobs.cancel(runs, name)
            return figures.message(f"{name} was removed from the queue."), *view(name, None)
        stop_run(runs, name)
        return figures.message(f"{name} was asked to stop: it stops after its current step, with a checkpoint."), *view(
            name, None
        )

    @handler(Role.USER)
    def resumed(visitor: Visitor, name: str) -> tuple[Any, ...]:
        show_run(runs, name)
        jobs.resume(runs, name, by=visitor.name)
        return figures.message(f"{name} resumes from its last checkpoint when it is its turn."), *view(name, None)

    @handler(Role.USER)
    def deleted(visitor: Visitor, name: str, sure: str) -> tuple[Any, ...]:
        if sure.strip() != name:
            raise RunError(f"Type the run's name, {name}, to delete it with its checkpoints and model")
        delete_run(runs, name)
        return figures.message(f"{name} is deleted."), "", *view("", None)

    @handler(Role.USER)
    def beside_base(visitor: Visitor, name: str) -> Iterator[tuple[Any, ...]]:
        yield figures.message(f"Checking {name} and its base …"), ""
        pair = serving.pair(name, site.home, site.watch.seen(fresh=True).models, site.address)
        if pair.conf:
            then = partial(site.watch.seen, fresh=True)
            title = f"Deploy {' and '.join(pair.conf.models)}, to compare {name} with its base"
            work = site.works.begin(title, visitor.name, serving.deploy, pair.conf, site.home, then=then)
            for _ in work.looks():
                yield show_works([work]), ""
            if work.problem:
                return
        yield "", f"/ask?model={quote(pair.run, safe='')}&beside={quote(pair.base, safe='')}"

    @handler(Role.VIEWER)
    def compared(visitor: Visitor, names: list[str] | None, metric: str) -> str:
        if not names or len(names) < 2:
            return figures.message("Choose at least two runs.") if names else ""
        return _comparison(runs, names, metric)

    seen, name, url = gr.State(None), gr.State(""), gr.Textbox(visible="hidden")
    timer = gr.Timer(_IDLE)
    notice = gr.HTML(elem_id="runs-said")
    state = gr.HTML(elem_id="run-state")
    with gr.Row():
        stop = gr.Button("Stop", visible=False)
        go_on = gr.Button("Resume", visible=False)
        beside = gr.Button("Compare it with its base", visible=False, variant="primary")
    curves = gr.HTML(elem_id="run-curves")
    log = gr.HTML(elem_id="run-log")
    with gr.Accordion("Delete this run", open=False, visible=False) as deleting:
        sure = gr.Textbox(label="The run's name, to confirm", max_lines=1)
        delete = gr.Button("Delete it permanently", variant="stop")
    listed = gr.HTML(elem_id="runs-list")
    with gr.Accordion("Compare runs", open=True):
        with gr.Row():
            several = gr.Dropdown(label="Runs", multiselect=True)
            metric = gr.Dropdown(label="Curve", choices=list(_METRICS), value="loss")
        comparison = gr.HTML(elem_id="runs-comparison")
    shown = [seen, listed, state, curves, log, stop, go_on, deleting, beside, timer]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    on(on_load(), opened, outputs=[name, several, *shown], show_progress="hidden")
    on(timer.tick, ticked, inputs=[name, seen], outputs=shown, trigger_mode="once", **quiet)
    on(stop.click, stopped, inputs=name, outputs=[notice, *shown])
    on(go_on.click, resumed, inputs=name, outputs=[notice, *shown])
    on(beside.click, beside_base, inputs=name, outputs=[notice, url], show_progress="hidden")
    url.change(None, inputs=url, js=GO)
    on(delete.click, deleted, inputs=[name, sure], outputs=[notice, name, *shown])
    for part in (several, metric):
        on(part.change, compared, inputs=[several, metric], outputs=comparison, **quiet)


def _list(known: list[RunSummary], queue: list[jobs.Job]) -> str:
    head = ("Run", "State", "Step", "Loss", "Validation loss", "Tokens/s", "Model", "Made")
    waiting = [
        (_link(job.name), _state(job), "", "", "", "", "", age(job.since)) for job in queue if job.state != "running"
    ]
    rows = [
        (
            _link(run.name),
            run.state,
            f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step or ""),
            figures.number(run.loss),
            figures.number(run.validation_loss),
            figures.number(run.tokens_per_second, 3),
            Path(run.base or "").name,
            age(run.created),
        )
        for run in known
        if run.name not in {job.name for job in queue if job.state != "running"}
    ]
    if not waiting and not rows:
        return figures.message("There are no runs yet: choose data on the screen Data, then train.")
    return figures.table("Runs", head, [*waiting, *rows], frozenset({0}))


def _link(name: str) -> str:
    return f'<a href="/runs?run={quote(name)}">{html.escape(name)}</a>'


def _state(job: jobs.Job) -> str:
    return f"waiting, {job.ahead} ahead" if job.state == "waiting" else job.state


def _one(runs: Path, name: str, job: jobs.Job | None) -> tuple[str, str, str, tuple[str, ...]]:
    """Returns state, curves, log and the applicable buttons of one run."""
    log = _log(runs, name)
    if job and job.state != "running":
        status = job.reason or f"requested by {job.by or 'somebody'} {age(job.since)} ago"
        kind = "problem" if job.state == "failed" else "note"
        stop = "" if job.state == "starting" else "Cancel" if job.state == "waiting" else "Remove it from the queue"
        return (
            f"<h2>{html.escape(name)}: {_state(job)}</h2>{figures.message(status, kind)}",
            "",
            log,
            (stop, "", "", ""),
        )
    try:
        run = show_run(runs, name)
    except RunError as error:
        return figures.message(str(error), "problem"), "", "", _NO_BUTTONS
    rows = metrics(runs, name)
    running = run.summary.state == "running"
    again = "" if running or run.summary.state == "done" else "Resume"
    beside = "Ask" if run.output and not running and run.summary.base else ""
    return (
        _figures(run, rows),
        _curves(rows),
        log,
        ("Stop" if running else "", again, "" if running else "Delete", beside),
    )


def _figures(run: RunDetails, rows: list[dict[str, Any]]) -> str:
    summary = run.summary
    steps = [row for row in rows if "loss" in row]
    last = steps[-1] if steps else {}
    known = {
        "Step": f"{summary.step}/{summary.total_steps}" if summary.total_steps else str(summary.step),
        "Loss": figures.number(summary.loss),
        "Validation loss": figures.number(summary.validation_loss),
        "Learning rate": figures.number(last.get("learning_rate")),
        "Tokens/s": figures.number(rate(steps[-20:])),
        "Time left": duration(seconds_left(rows)) if summary.state == "running" else "",
        "Model": Path(summary.base or "").name,
        "Method": f"{summary.method}, {summary.objective}",
    }
    shown = figures.pairs({key: value for key, value in known.items() if value})
    verdict = run.result.get("verdict", {})
    warned = figures.lines("It has not learned", [] if verdict.get("learned", True) else verdict.get("reasons", []))
    status = figures.message(summary.reason, "problem" if summary.state in ("failed", "damaged") else "note")
    onward = f'<p><a class="onward" href="/deploy?model={quote(summary.name)}">Deploy it</a></p>' if run.output else ""
    return f"<h2>{html.escape(summary.name)}: {summary.state}</h2>{status}{shown}{warned}{onward}"


def _curves(rows: list[dict[str, Any]]) -> str:
    def of(key: str) -> figures.Points:
        having = [row for row in rows if row.get(key) is not None]
        return [row["step"] for row in having], [row[key] for row in having]

    charts = [
        figures.curves("Loss", {"loss": of("loss"), "validation loss": of("validation_loss")}),
        figures.curves(
            "Accuracy of rewards",
            {"training": of("rewards/accuracies"), "validation": of("validation_rewards/accuracies")},
        ),
        figures.curves("Learning rate", {"learning rate": of("learning_rate")}),
        figures.curves("Tokens per second", {"tokens/s": of("tokens_per_second")}),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _log(runs: Path, name: str) -> str:
    text = "\n".join(jobs.read_log(runs, name).splitlines()[-_LINES:])
    return (
        f'<h2>Log</h2><pre class="log" tabindex="0" role="region" aria-label="Log">{html.escape(text)}</pre>'
        if text
        else ""
    )


def _buttons(name: str, labels: tuple[str, ...]) -> tuple[Any, ...]:
    stop, again, delete, beside = labels
    return (
        gr.Button(stop or "Stop", visible=bool(stop)),
        gr.Button("Resume", visible=bool(again)),
        gr.Accordion(f"Delete {name}", open=False, visible=bool(delete)),
        gr.Button("Compare it with its base", visible=bool(beside)),
    )


def _comparison(runs: Path, names: list[str], metric: str) -> str:
    found = compare_runs(runs, names, metric)
    curves = figures.curves(metric.replace("_", " ").capitalize(), found.curves)
    differ = [(key, *map(_value, values)) for key, values in found.conf.items()]
    shown = [
        (key, *map(_value, values))
        for key, values in found.figures.items()
        if any(value is not None for value in values)
    ]
    link = f'<p><a href="/runs?compare={quote(",".join(names))}">Link to this comparison</a></p>'
    confs = (
        figures.table("Differences between their confs", ("Key", *names), differ)
        if differ
        else figures.message("Their confs are the same.")
    )
    return curves + figures.table("Figures", ("Figure", *names), shown) + confs + link


def _value(value: Any) -> str:
    return (
        figures.number(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else ""
        if value is None
        else str(value)
    )
