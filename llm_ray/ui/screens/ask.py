"""The screen Ask: a conversation with one deployed model, or with two side by side."""

from __future__ import annotations

import html
import secrets
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from llm_ray.app.ask import Key, Prompt, Settings, parse, prepare_to_ask
from llm_ray.app.serving import ModelStatus
from llm_ray.errors import ConfError, ServeError
from llm_ray.ui.fields import decimal, optional, whole
from llm_ray.ui.figures import note
from llm_ray.ui.handlers import handler, on, on_load
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.talk import Generation, Turn, conversation, row, shown
from llm_ray.ui.users import Role
from llm_ray.ui.watch import LOOK_AGAIN

if TYPE_CHECKING:
    from llm_ray.ui.screens import Site

NOBODY = "none"
_SHOW_EVERY = 0.05  # seconds
_SHOW_LONG = 1e-4  # seconds more per character shown: a browser draws the whole answer anew each time
_FIRST = 0.25  # seconds to wait for the first word, since a browser's redraw would delay it
_IN_PROGRESS: dict[tuple[str, str], list[Generation]] = {}
"""Running generations, by visitor name and conversation."""
_NO_TALK = "[]"  # an empty gr.Code carries an ARIA label where none is allowed


def build(site: Site) -> None:
    """Creates the screen's components."""
    with gr.Row():
        model = gr.Dropdown([], label="Model", info="What is deployed", scale=1)
        beside = gr.Dropdown(
            [NOBODY], value=NOBODY, label="Beside it", info="A second model that gets the same questions", scale=1
        )
    state = gr.HTML(elem_id="ask-state")
    with gr.Row():
        left, right = _chat("Answers", "ask-left", True), _chat("Answers beside it", "ask-right", False)
    question = gr.Textbox(
        label="Question", lines=2, max_lines=8, elem_id="ask-question", info="Enter sends, Shift+Enter is a new line"
    )
    with gr.Row():
        send, stop, new = gr.Button("Send", variant="primary"), gr.Button("Stop"), gr.Button("New talk")
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(label="System prompt", lines=2, info="Comes before the conversation. Empty: none")
        with gr.Row():
            temperature = optional("Temperature", "0: always the likeliest token. Empty: the model's default")
            top_p = optional("Top p", "Empty: the model's default")
            top_k = optional("Top k", "Empty: the model's default")
            tokens = optional("Most tokens", "For one answer", "512")
            seed = optional("Seed", "Reproduces the same answer")
        key = gr.Textbox(
            label="API key",
            type="password",
            info="If the endpoint requires one. It is kept only in this tab, until it is closed",
        )
    with gr.Accordion("This conversation as training data", open=False):
        gr.HTML(note("One row of a .jsonl file, as accepted by the screen Data."))
        data = gr.Code(
            _NO_TALK,
            language="json",
            label="Messages",
            interactive=False,
            wrap_lines=True,
            buttons=["copy", "download"],
        )
    first, second = gr.Textbox(visible=False), gr.Textbox(visible=False)  # from the URL
    turns, talk, known = gr.State([]), gr.State(""), gr.State([])

    @handler(Role.VIEWER)
    def look(visitor: Visitor, wanted: str, second: str) -> tuple[Any, ...]:
        threading.Thread(target=prepare_to_ask, daemon=True).start()
        models = _models(site)
        first = wanted if wanted in models else next(iter(models), None)
        other = second if second in models else NOBODY
        missing = [name for name in (wanted, second) if name and name not in models and name != NOBODY]
        return (
            gr.update(choices=list(models), value=first),
            gr.update(choices=[NOBODY, *models], value=other),
            _state(site, models, missing),
            gr.update(visible=other != NOBODY),
            list(models),
        )

    @handler(Role.VIEWER)
    def again(visitor: Visitor, first: str | None, second: str | None, known: list[str]) -> tuple[Any, ...]:
        models = _models(site)
        if list(models) == known:  # keep an open dropdown open
            return gr.skip(), gr.skip(), _state(site, models, []), known
        now = first if first in models else next(iter(models), None)
        other = second if second in models else NOBODY
        return (
            gr.update(choices=list(models), value=now),
            gr.update(choices=[NOBODY, *models], value=other),
            _state(site, models, []),
            list(models),
        )

    @handler(Role.VIEWER)
    def side_by_side(visitor: Visitor, second: str | None) -> Any:
        return gr.update(visible=bool(second) and second != NOBODY)

    @handler(Role.USER)
    def answer(
        visitor: Visitor,
        turns: list[Turn],
        question: str,
        model: str | None,
        beside: str | None,
        system: str,
        temperature: str,
        top_p: str,
        top_k: str,
        tokens: str,
        seed: str,
        key: str,
    ) -> Iterator[tuple[Any, ...]]:
        if not (question or "").strip():
            raise ConfError("There is no question yet: type one and send it.")
        settings = Settings(
            max_tokens=whole(tokens, "Most tokens"),
            temperature=decimal(temperature, "Temperature", most=2),
            top_p=decimal(top_p, "Top p", most=1),
            top_k=whole(top_k, "Top k", 0),
            seed=whole(seed, "Seed", 0),
            system=(system or "").strip() or None,
        )
        asked = [
            _generation(site, name, side, turns, question, settings, key) for side, name in enumerate((model, beside))
        ]
        if not any(asked):
            raise ServeError("No model is deployed: deploy one on the screen Deploy.")
        talk, changed = secrets.token_hex(8), threading.Event()
        running = [generation for generation in asked if generation]
        _IN_PROGRESS[visitor.name, talk] = running
        begun: Any = talk
        try:
            for generation in running:
                generation.begin(changed)
            changed.wait(_FIRST)
            while True:
                done = all(generation.done for generation in running)
                answers = [generation.said() if generation else None for generation in asked]
                now = [*turns, Turn(question, (answers[0], answers[1]))]
                chats = [shown(now, side) if asked[side] else gr.skip() for side in (0, 1)]
                if done:
                    yield *chats, now, begun, "", row(now, 0, settings.system)
                    return
                # Updates only the chats, so that the browser redraws little per word.
                yield *chats, gr.skip(), begun, gr.skip(), gr.skip()
                begun = gr.skip()
                changed.wait(1.0)
                changed.clear()
                if length := sum(len(answer.text) for answer in answers if answer):  # show the first word at once
                    time.sleep(min(_SHOW_EVERY + _SHOW_LONG * length, 1.0))
        finally:
            for generation in running:
                generation.stop()
            _IN_PROGRESS.pop((visitor.name, talk), None)

    @handler(Role.USER)
    def end(visitor: Visitor, talk: str) -> None:
        for generation in _IN_PROGRESS.get((visitor.name, talk), []):
            generation.stop()

    @handler(Role.VIEWER)
    def anew(visitor: Visitor, talk: str) -> tuple[Any, ...]:
        for generation in _IN_PROGRESS.get((visitor.name, talk), []):
            generation.stop()
        return [], [], [], "", _NO_TALK

    wanted = "() => ['model', 'beside'].map(name => new URLSearchParams(location.search).get(name) || '')"
    on(on_load(), look, [first, second], [model, beside, state, right, known], js=wanted, show_progress="hidden")
    on(gr.Timer(LOOK_AGAIN).tick, again, [model, beside, known], [model, beside, state, known], show_progress="hidden")
    on(beside.change, side_by_side, beside, right, show_progress="hidden")
    inputs = [turns, question, model, beside, system, temperature, top_p, top_k, tokens, seed, key]
    for event in (send.click, question.submit):
        on(event, answer, inputs, [left, right, turns, talk, question, data], show_progress="hidden", at_once=16)
    on(stop.click, end, talk, None, show_progress="hidden")
    for event in (new.click, left.clear, right.clear):
        on(event, anew, talk, [left, right, turns, talk, data], show_progress="hidden")


def _chat(label: str, id: str, visible: bool) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        elem_id=id,
        visible=visible,
        height=420,
        buttons=["copy", "copy_all"],
        feedback_options=None,
        allow_tags=False,
        latex_delimiters=[],
        layout="bubble",
        placeholder="Nothing has been asked yet.",
    )


def _models(site: Site) -> dict[str, ModelStatus]:
    """Returns the models that can be asked, adapters after their base models."""
    found: dict[str, ModelStatus] = {}
    for name, entry in sorted(site.watch.seen().models.items()):
        if entry.model.task != "embeddings":
            found |= {name: entry} | dict.fromkeys(entry.model.adapters, entry)
    return found


def _state(site: Site, models: dict[str, ModelStatus], missing: list[str]) -> str:
    seen = site.watch.seen()
    if seen.away:
        return note(f"The cluster is unreachable: {seen.away}", "bad")
    if missing:
        return note(
            f"Not deployed: {', '.join(missing)}. Deploy on the screen Deploy, or in a terminal: llm-ray serve "
            f"deploy --model {missing[0]}",
            "bad",
        )
    if not models:
        return note(
            "Nothing is deployed yet. Deploy a model on the screen Deploy, or in a terminal: llm-ray serve deploy "
            "--model NAME"
        )
    if unready := [
        f"{name} ({entry.reason or entry.state.lower()})" for name, entry in models.items() if not entry.ready
    ]:
        return note(f"Not ready: {', '.join(unready)}")
    url = seen.overview.serving.url if seen.overview else None
    return f'<p class="frame-note">Answers come from {html.escape(str(url))}</p>'


def _generation(
    site: Site, name: str | None, side: int, turns: list[Turn], question: str, settings: Settings, key: str
) -> Generation | None:
    if not name or name == NOBODY:
        return None
    models = _models(site)
    seen = site.watch.seen()
    if name not in models or seen.overview is None or seen.overview.serving.url is None:
        raise ServeError(f"{name} is no longer deployed: choose another model, or deploy it on the screen Deploy.")
    secret = (key or "").strip()
    if secret and (not secret.isascii() or not secret.isprintable() or " " in secret):
        raise ConfError("API key: a key is one word of ASCII characters.")
    endpoint = parse(seen.overview.serving.url, Key(secret, "the field API key") if secret else None)
    if models[name].model.task == "completions":  # without a chat template, the question is sent as a raw prompt
        return Generation(
            endpoint, name, Prompt(question), Settings(**{**_plain(settings), "system": None, "completion": True})
        )
    return Generation(
        endpoint, name, Prompt([*conversation(turns, side), {"role": "user", "content": question}]), settings
    )


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
