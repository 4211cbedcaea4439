"""The screen Train: choose data, model and name, then finetune; the other fields come from the conf's schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import gradio as gr

from llm_ray.apart import apart
from llm_ray.app.confs import Field, command_of, conf_of, dump, fields, settings_of
from llm_ray.app.finetune import PlanReport, report_plan
from llm_ray.app.jobs import submit
from llm_ray.app.runs import watch_runs
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import Paths
from llm_ray.errors import ConfError, DataError, LlmRayError
from llm_ray.progress import duration
from llm_ray.ui import figures
from llm_ray.ui.choices import (
    check_allowed,
    data_choice,
    data_choices,
    data_settings,
    data_source,
    model_choices,
    name_of_run,
)
from llm_ray.ui.handlers import GO, handler, on, on_load
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role

if TYPE_CHECKING:
    from llm_ray.ui.screens import Site

_MOST_CONF_BYTES = 1 << 20
_AT_ONCE = 2  # concurrent plans, each of which uses all cores
_NONE_YET = "# Data, model and name first"  # an empty gr.Code carries an ARIA label where none is allowed


def build(site: Site) -> None:
    """Creates the screen's components."""
    known = fields()

    def settings_from(
        visitor: Visitor, data: str | None, model: str | None, name: str | None, values: Sequence[str | None]
    ) -> dict[str, str]:
        source = data_source(site, visitor, data)
        if not (model or "").strip():
            raise ConfError("Choose a model: an imported one (llm-ray model import), or organisation/name on the hub")
        if not (name or "").strip():
            raise ConfError("Give the run a name")
        given = {field.name: value or "" for field, value in zip(known, values, strict=True)}
        needed = {"train": source, "model": model or "", "name": name or ""}
        return needed | {key: value for key, value in data_settings(source).items() if not given[key]} | given

    def conf_from(visitor: Visitor, settings: dict[str, str]) -> FinetuneConf:
        conf = conf_of(settings, site.home)
        check_allowed(site, visitor, conf)
        return conf

    @handler(Role.VIEWER)
    def opened(visitor: Visitor, here: gr.Request) -> tuple[Any, ...]:
        data, models = here.query_params.get("data"), model_choices(site)
        model = here.query_params.get("model") or (models[0] if models else None)
        name = _free_name(site, data) if data else ""
        return (
            gr.Dropdown(choices=data_choices(site, visitor), value=data or None),
            gr.Dropdown(choices=models, value=model),
            name,
        )

    @handler(Role.VIEWER)
    def named(visitor: Visitor, data: str | None, name: str | None) -> Any:
        return _free_name(site, data) if data and not name else gr.skip()

    @handler(Role.VIEWER)
    def shown(
        visitor: Visitor, data: str | None, model: str | None, name: str | None, *values: str | None
    ) -> tuple[str, str, str]:
        try:
            settings = settings_from(visitor, data, model, name, values)
            return dump(conf_from(visitor, settings)), command_of(settings), ""
        except LlmRayError as error:
            return (
                _NONE_YET,
                _NONE_YET,
                figures.message(str(error), "note" if not (data and model and name) else "problem"),
            )

    @handler(Role.USER)
    def planned(
        visitor: Visitor, data: str | None, model: str | None, name: str | None, *values: str | None
    ) -> Iterator[Any]:
        yield from _plan(conf_from(visitor, settings_from(visitor, data, model, name, values)))

    @handler(Role.USER)
    def started(
        visitor: Visitor,
        seen: tuple[str, PlanReport] | None,
        data: str | None,
        model: str | None,
        name: str | None,
        *values: str | None,
    ) -> Iterator[Any]:
        settings = settings_from(visitor, data, model, name, values)
        conf = conf_from(visitor, settings)
        plan = seen
        if plan is None or plan[0] != dump(conf):
            for summary, plan in _plan(conf):
                yield summary, plan, gr.skip()
        if plan is None or not plan[1].fits:
            yield gr.skip(), plan, ""
            return
        job = submit(conf, by=visitor.name, command=command_of(settings))
        url = f"/runs?run={quote(job.name)}"
        summary = (
            f"{job.name} waits for {job.ahead} other finetune(s)."
            if job.state == "waiting" and job.ahead
            else f"{job.name} has started."
        )
        yield f'{figures.message(summary)}<p><a class="onward" href="{url}">Watch it</a></p>', plan, url

    @handler(Role.USER)
    def uploaded(visitor: Visitor, path: str) -> tuple[Any, ...]:
        taken = site.uploads.take(visitor, path)
        try:
            if taken.stat().st_size > _MOST_CONF_BYTES:
                raise ConfError(f"{taken.name} is too large for a conf")
            settings = settings_of(taken.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ConfError(f"{taken.name} is not UTF-8 text: upload a conf (YAML)") from error
        except LlmRayError as error:
            raise ConfError(f"{taken.name}: {error}") from error
        finally:
            site.uploads.drop(visitor, taken)
        data = _choice_of(site, visitor, settings.get("train", ""))
        return (
            None,
            data,
            settings.get("model"),
            settings.get("name", ""),
            *(settings.get(field.name, "") for field in known),
        )

    with gr.Row():
        with gr.Column(scale=3):
            data = gr.Dropdown(
                label="Data", info="From the screen Data, or organisation/name on the hub", allow_custom_value=True
            )
            model = gr.Dropdown(
                label="Model", info="Imported, from a run, or organisation/name on the hub", allow_custom_value=True
            )
            name = gr.Textbox(label="Name", info="Name of the run and of its model", max_lines=1)
            with gr.Row():
                plan_it, start = gr.Button("Plan"), gr.Button("Start", variant="primary")
            notice = gr.HTML(elem_id="train-said")
            with gr.Accordion("All settings", open=False):
                gr.Markdown("Empty fields use the value shown. Values are YAML, as after `--set`.")
                parts = [
                    _section(section, list(group))
                    for section, group in groupby(known, lambda field: field.section.partition(".")[0])
                ]
            inner = [part for several in parts for part in several]
        with gr.Column(scale=2):
            command = gr.Code(
                label="The equivalent command",
                language="shell",
                interactive=False,
                wrap_lines=True,
                lines=1,
                max_lines=8,
                elem_id="train-command",
                value=_NONE_YET,
            )
            problem = gr.HTML(elem_id="train-problem")
            conf = gr.Code(
                _NONE_YET,
                label="The conf that will run",
                language="yaml",
                interactive=False,
                wrap_lines=True,
                elem_id="train-conf",
            )
            sent = gr.File(label="Fill the form from a conf (.yaml)", height=150)
    seen, url = gr.State(None), gr.Textbox(visible="hidden")
    every = [data, model, name, *inner]
    quiet: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    on(on_load(), opened, outputs=[data, model, name], show_progress="hidden")
    on(data.change, named, inputs=[data, name], outputs=name, show_progress="hidden")
    on(
        lambda call, **options: gr.on([part.change for part in every], call, **options),
        shown,
        inputs=every,
        outputs=[conf, command, problem],
        **quiet,
    )
    on(plan_it.click, planned, inputs=every, outputs=[notice, seen], show_progress="hidden", at_once=_AT_ONCE)
    on(
        start.click,
        started,
        inputs=[seen, *every],
        outputs=[notice, seen, url],
        show_progress="hidden",
        at_once=_AT_ONCE,
    )
    on(sent.upload, uploaded, inputs=sent, outputs=[sent, *every])
    url.change(None, inputs=url, js=GO)


def _section(title: str, group: list[Field]) -> list[Any]:
    """Returns the fields of a section inside a closed accordion; top-level fields without one."""
    if not title:
        return [_field(field) for field in group]
    with gr.Accordion(title.capitalize(), open=False):
        return [_field(field) for field in group]


def _field(field: Field) -> Any:
    label = field.name.removeprefix(f"{field.section.partition('.')[0]}.") if field.section else field.name
    if field.choices:
        default = f"default ({field.default})" if field.default else "default"
        return gr.Dropdown(
            label=label, info=field.text, choices=[(default, ""), *((one, one) for one in field.choices)], value=""
        )
    return gr.Textbox(label=label, info=f"{field.text} ({field.kind})", placeholder=field.default, max_lines=1)


def _plan(conf: FinetuneConf) -> Iterator[tuple[str, tuple[str, PlanReport] | None]]:
    """Yields progress messages, then the plan together with the conf that it is for."""
    yield figures.message("Reading the data …"), None
    try:
        with apart(report_plan, conf) as work:
            for line in work.lines():
                yield figures.message(line), None
            found = work.result()
    except LlmRayError as error:
        yield figures.message(str(error), "problem"), None
        return
    yield _shown(found), (dump(conf), found)


def _shown(plan: PlanReport) -> str:
    known = {
        "Memory": f"{plan.memory / 2**30:.1f} of {plan.memory_here / 2**30:.1f} GiB",
        "Time": duration(plan.seconds) or "not measured",
    }
    if plan.fits:
        verdict = figures.message(
            "It fits this host." if plan.conf.runtime.mode == "local" else "It fits hosts like this one."
        )
    else:
        verdict = figures.message("It does not fit into this host's memory and is not started.", "problem")
        verdict += figures.lines("Ways to make it fit", plan.advice)
    warned = figures.lines("Warnings", plan.sections["Warnings"])
    rest = "".join(figures.lines(title, entries) for title, entries in plan.sections.items() if title != "Warnings")
    return f"{verdict}{figures.pairs(known)}{warned}<details><summary>The whole plan</summary>{rest}</details>"


def _free_name(site: Site, data: str | None) -> str:
    return name_of_run(data or "", [run.name for run in watch_runs(Paths.of(site.home).runs)])


def _choice_of(site: Site, visitor: Visitor, train: str) -> str | None:
    names = conf_list(train)
    if len(names) > 1:
        raise DataError(
            f"the conf names several files ({', '.join(Path(n).name for n in names)}); the form takes one: join them, "
            "or use the command line"
        )
    return data_choice(site, visitor, names[0]) if names else None


def conf_list(text: str) -> list[str]:
    """Returns the entries of a setting that is one string or a list of strings."""
    from llm_ray.conf.yamltext import value

    found = value(text) if text else []
    return [found] if isinstance(found, str) else [str(one) for one in found or []]
