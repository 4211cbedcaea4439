"""The screen Data: training files and a preview of what the model sees of them."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import gradio as gr

from llm_ray.apart import apart
from llm_ray.app.confs import conf_of
from llm_ray.app.data import Examined, Preview, PreviewRow, examine
from llm_ray.errors import LlmRayError
from llm_ray.ui import figures
from llm_ray.ui.choices import check_allowed, data_choices, data_settings, data_source, model_choices, without_folders
from llm_ray.ui.handlers import handler, on, on_load
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role

if TYPE_CHECKING:
    from llm_ray.ui.screens import Site

_ROWS = 50  # rows to preview
_PAGE = 5  # rows per page
_AT_ONCE = 2  # concurrent reads, each of which uses all cores


def build(site: Site) -> None:
    """Creates the screen's components."""

    @handler(Role.VIEWER)
    def opened(visitor: Visitor, here: gr.Request) -> tuple[Any, ...]:
        choices, models = data_choices(site, visitor), model_choices(site)
        wanted = here.query_params.get("data")  # without it keep the choice, which an upload may have set meanwhile
        named = {"value": wanted} if wanted else {}
        return gr.Dropdown(choices=choices, **named), gr.Dropdown(choices=models, value=models[0] if models else None)

    # A separate, fast handler: Gradio treats state as changed by a handler that was still running while another changed
    # it.
    @handler(Role.VIEWER)
    def linked(visitor: Visitor, here: gr.Request) -> Any:
        return here.query_params.get("data") or gr.skip()

    @handler(Role.USER)
    def sent(visitor: Visitor, path: str) -> tuple[Any, ...]:
        taken = site.uploads.take(visitor, path)
        choice = f"my files/{taken.name}"
        return None, gr.Dropdown(choices=data_choices(site, visitor), value=choice), choice

    @handler(Role.VIEWER)
    def look(visitor: Visitor, choice: str | None, model: str | None) -> Iterator[tuple[Any, ...]]:
        if not choice:
            yield figures.message("Upload a file, or choose data."), "", "", None, *_pager(None, 0)
            return
        short = functools.partial(without_folders, site, visitor)
        yield figures.message("Reading the data …"), "", "", None, *_pager(None, 0)
        try:
            source = data_source(site, visitor, choice)
            settings = {
                "train": source,
                "model": model or next(iter(model_choices(site)), ""),
                "name": "preview",
                "data.on_bad_row": "skip",
            }
            conf = conf_of(settings | data_settings(source), site.home)
            check_allowed(site, visitor, conf)
            with apart(examine, conf, _ROWS) as work:
                for line in work.lines():
                    yield figures.message(short(line)), "", "", None, *_pager(None, 0)
                found = work.result()
        except LlmRayError as error:
            yield figures.message(short(str(error)), "problem"), "", "", None, *_pager(None, 0)
            return
        onward = f'<p><a class="onward" href="/train?data={quote(choice, safe="")}">Train on this data</a></p>'
        yield (
            figures.message(f"{choice}: {found.figures.read} rows read."),
            _summary(found, short) + onward,
            _histogram(found),
            found.preview,
            *_pager(found.preview, 0),
        )

    @handler(Role.VIEWER)
    def forward(visitor: Visitor, seen: Preview | None, at: int) -> tuple[Any, ...]:
        return _pager(seen, at + _PAGE)

    @handler(Role.VIEWER)
    def back(visitor: Visitor, seen: Preview | None, at: int) -> tuple[Any, ...]:
        return _pager(seen, at - _PAGE)

    @handler(Role.USER)
    def delete(visitor: Visitor, choice: str | None) -> tuple[Any, ...]:
        prefix, _, name = (choice or "").partition("/")
        if prefix != "my files" or not name:
            raise gr.Error(
                "Only files that you have uploaded can be deleted here.", title="Not yours", print_exception=False
            )
        site.uploads.drop(visitor, site.uploads.folder(visitor) / Path(name).name)
        return (
            gr.Dropdown(choices=data_choices(site, visitor), value=None),
            figures.message(f"{name} is deleted."),
            "",
            "",
            None,
            *_pager(None, 0),
        )

    with gr.Row():
        file = gr.File(label="Upload a file (.jsonl, .json, .csv, .parquet, .txt)", height=160)
        with gr.Column():
            choice = gr.Dropdown(
                label="Data",
                info="One of your files, a file of the data folder, or organisation/name on the hub",
                allow_custom_value=True,
            )
            model = gr.Dropdown(label="Model for counting tokens", allow_custom_value=True)
            with gr.Row():
                show = gr.Button("Look at it", variant="primary")
                drop = gr.Button("Delete the file")
    notice = gr.HTML(elem_id="data-said")
    with gr.Row():
        with gr.Column(min_width=320):
            summary = gr.HTML(elem_id="data-summary")
        with gr.Column(min_width=320):
            chart = gr.HTML(elem_id="data-chart")
    rows = gr.HTML(elem_id="data-rows")
    with gr.Row(visible=False) as buttons:
        earlier, later = gr.Button("Earlier rows", size="sm"), gr.Button("Later rows", size="sm")
    seen, at = gr.State(None), gr.State(0)
    asked = gr.State("")  # choice to show without a click
    pager = [rows, buttons, at]
    shown = [notice, summary, chart, seen, *pager]
    on(on_load(), opened, outputs=[choice, model], show_progress="hidden")
    on(on_load(), linked, outputs=asked, show_progress="hidden")
    on(file.upload, sent, inputs=file, outputs=[file, choice, asked])
    on(asked.change, look, inputs=[asked, model], outputs=shown, show_progress="hidden", at_once=_AT_ONCE)
    on(show.click, look, inputs=[choice, model], outputs=shown, show_progress="hidden", at_once=_AT_ONCE)
    on(later.click, forward, inputs=[seen, at], outputs=pager, show_progress="hidden")
    on(earlier.click, back, inputs=[seen, at], outputs=pager, show_progress="hidden")
    on(drop.click, delete, inputs=choice, outputs=[choice, *shown])


def _summary(found: Examined, short: Callable[[str], str]) -> str:
    stats = found.figures
    train, held = stats.train, stats.validation
    known = {
        "Format": ", ".join(stats.formats),
        "Rows read": f"{stats.read:,}",
        "Training rows": f"{train.rows:,}",
        "Held-out rows": f"{held.rows:,}" if held else "0",
        "Tokens": f"{train.tokens + (held.tokens if held else 0):,}",
        "Supervised": f"{train.supervised_share:.0%}",
        "Longest row": f"{max(train.longest, held.longest if held else 0):,} tokens",
        "Bad rows": f"{stats.bad:,}",
        "Dropped": f"{sum(stats.dropped.values()):,}",
        "Cut": f"{stats.truncated:,}",
    }
    facts = [
        *map(short, stats.notes),
        found.left_out_line(),
        *(f"{n} dropped: {why}" for why, n in stats.dropped.items()),
    ]
    if stats.bad:
        facts.append(f"{stats.bad} bad rows: a finetune stops at the first, unless data.on_bad_row is skip")
    if stats.repeated:
        facts.append(f"{stats.repeated} rows repeat another one")
    if stats.contradicting:
        facts.append(f"{stats.contradicting} rows contradict another one")
    facts += [*map(short, stats.examples), f"validation: {stats.validation_reason}" if stats.validation_reason else ""]
    return "<h2>What it is</h2>" + figures.pairs(known) + figures.lines("What to know", filter(None, facts))


def _histogram(found: Examined) -> str:
    columns = [(str(b.first) if b.first == b.last else f"{b.first}–{b.last}", b.sequences) for b in found.bars]
    return "<h2>How long the rows are</h2>" + figures.bars("Sequences by tokens", "tokens", columns)


def _pager(seen: Preview | None, at: int) -> tuple[Any, ...]:
    """Returns the page of rows that starts at `at`, whether there are more, and its position."""
    if seen is None or not seen.rows:
        return "", gr.Row(visible=False), 0
    at = max(0, min(at, (len(seen.rows) - 1) // _PAGE * _PAGE))
    page = seen.rows[at : at + _PAGE]
    head = f"<h2>Rows {at + 1} to {at + len(page)} of the first {len(seen.rows)}, as the model sees them</h2>"
    legend = "<p><mark>Marked</mark> text is trained on; the rest is context.</p>"
    return head + legend + "".join(map(_row, page)), gr.Row(visible=len(seen.rows) > _PAGE), at


def _row(row: PreviewRow) -> str:
    parts = []
    for one in row.sequences:
        text = "".join(
            f"<mark>{html.escape(span.text)}</mark>" if span.supervised else f"<span>{html.escape(span.text)}</span>"
            for span in one.spans
        )
        learnt = f"{one.answer}: {one.tokens} tokens, {one.supervised} compared" if one.answer else ""
        count = learnt or f"{one.tokens} tokens, {one.supervised} trained on"
        parts.append(f'<p class="count">{count}</p><pre class="row">{text}</pre>')
    dropped = f'<p class="count">dropped: {html.escape(row.dropped)}</p>' if row.dropped else ""
    return f"<article><h3>{html.escape(Path(row.place).name)}</h3>{dropped}{''.join(parts)}</article>"
