"""The screen Deploy: a model that answers over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from llm_ray.apart import Apart
from llm_ray.app import models as registry
from llm_ray.app import serving
from llm_ray.conf.engines import ENGINES, EngineChoice, able, engines_with, forms
from llm_ray.conf.section import Paths
from llm_ray.conf.serve import ServeConf
from llm_ray.errors import ConfError
from llm_ray.ui.fields import optional, whole
from llm_ray.ui.figures import note, table
from llm_ray.ui.handlers import handler, on, on_load
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role
from llm_ray.ui.watch import LOOK_AGAIN, Seen
from llm_ray.ui.work import show_works

if TYPE_CHECKING:
    from llm_ray.ui.screens import Site

_GIB = 2**30
_ESTIMATE_TIMEOUT = 180.0
_NONE_YET = "# Nothing is deployed yet"  # an empty gr.Code carries an ARIA label where none is allowed


def build(site: Site) -> None:
    """Creates the screen's components."""
    paths, planner = Paths.of(site.home), Apart()
    with gr.Row():
        model = gr.Dropdown([], label="Model", info="A base model in the registry, or a run's model")
        name = gr.Textbox(label="Name", info="Its name for clients. Empty: the model's own name")
    with gr.Row():
        engine = gr.Radio(
            [
                ("Automatic: the fastest that can serve the model", "auto"),
                *((kind.title, name) for name, kind in ENGINES.items()),
            ],
            value="auto",
            label="Engine",
        )
        form = gr.Radio(
            list(forms("auto")),
            value=forms("auto")[0],
            label="Weights",
            info="auto: what the engine is fastest with; vLLM and transformers: as stored, if the CPU supports it",
        )
    with gr.Row():
        cpus = optional("Cores of a replica", "Empty: as many free cores as are useful")
        replicas = gr.Number(label="Replicas", value=1, minimum=1, precision=0)
    with gr.Accordion("More", open=False):
        adapters = gr.Dropdown(
            [], multiselect=True, label="Adapters", info="From runs, each under the run's name; only with engine vLLM"
        )
        with gr.Row():
            length = optional("Longest prompt and answer, in tokens", "Empty: the model's, at most 8192")
            port = optional("Port", "Used if nothing is served yet. Empty: 8000")
    cost = gr.HTML(note("Check shows the required resources before anything is loaded."), elem_id="deploy-cost")
    with gr.Row():
        check, start = gr.Button("Check"), gr.Button("Deploy", variant="primary")
    progress = gr.HTML(elem_id="deploy-progress")
    command = gr.Code(
        "llm-ray serve deploy --model NAME",
        language="shell",
        label="In a terminal",
        interactive=False,
        wrap_lines=True,
        lines=1,
        elem_id="deploy-command",
    )
    gr.Markdown("## Deployed")
    deployed = gr.HTML(elem_id="deployed")
    with gr.Row():
        chosen = gr.Dropdown([], label="Deployed model", info="To stop it, and for the examples")
        stop = gr.Button("Stop it …", variant="stop")
    with gr.Group(visible=False) as sure:
        really = gr.HTML()
        with gr.Row():
            yes, no = gr.Button("Stop", variant="stop"), gr.Button("Keep it")
    gr.Markdown("## Ask it from elsewhere")
    endpoint = gr.HTML()
    with gr.Tabs():
        with gr.Tab("curl"):
            curl = gr.Code(_NONE_YET, language="shell", label="With curl", interactive=False, wrap_lines=True, lines=1)
        with gr.Tab("Python"):
            python = gr.Code(
                _NONE_YET, language="python", label="In Python, with httpx", interactive=False, wrap_lines=True, lines=1
            )
        with gr.Tab("openai"):
            openai = gr.Code(
                _NONE_YET,
                language="python",
                label="In Python, with the openai SDK",
                interactive=False,
                wrap_lines=True,
                lines=1,
            )
    known, first = gr.State([]), gr.Textbox(visible=False)  # `first`: the model in the URL

    def conf(given: tuple[Any, ...]) -> ServeConf:
        model, name, engine, form, cpus, replicas, adapters, length, port = given
        if not model:
            raise ConfError(
                "Choose a model first. If there is none yet, import one (llm-ray model import) or finetune one."
            )
        if adapters and not able(engine, "adapters"):
            raise ConfError(
                f"Adapters require engine {engines_with('adapters')}: choose one, or deploy the run's own model."
            )
        return serving.conf_of(
            [model],
            site.home,
            names=[name.strip()] if name and name.strip() else (),
            address=site.address,
            port=whole(port, "Port"),
            engine=engine,
            weights=form if _converts(engine) else None,
            precision=form if not _converts(engine) else None,
            cpus=whole(cpus, "Cores of a replica"),
            replicas=int(replicas or 1),
            adapters={run: run for run in adapters or []},
            max_model_len=whole(length, "Longest prompt and answer", 16),
        )

    def estimate(conf: ServeConf) -> list[serving.Estimate]:
        seen = site.watch.seen()
        rooms = seen.overview.rooms if seen.overview else []
        found: list[serving.Estimate] = planner.call(
            serving.estimate, conf, rooms, seen.models, timeout=_ESTIMATE_TIMEOUT
        )
        return found

    def listed(seen: Seen) -> tuple[str, str]:
        return _deployed(seen), _endpoint(seen)

    @handler(Role.VIEWER)
    def look(visitor: Visitor, wanted: str) -> tuple[Any, ...]:
        found = [info for info in registry.list_models(paths) if not info.problem]
        names = {
            f"{info.name} ({'run' if info.kind == 'run' else 'base model'}, {info.parameters / 1e6:,.0f} M)": info.name
            for info in found
        }
        first = wanted if wanted in names.values() else next(iter(names.values()), None)
        runs = [
            info.name
            for info in found
            if info.kind == "run" and (paths.runs / info.name / "output" / "adapter").is_dir()
        ]
        seen = site.watch.seen()
        models = sorted(seen.models)
        now = models[0] if models else None
        return (
            gr.update(choices=list(names.items()), value=first),
            gr.update(choices=runs),
            *listed(seen),
            gr.update(choices=models, value=now),
            *_examples(seen, now),
            show_works(site.works.listed()),
            models,
        )

    @handler(Role.VIEWER)
    def again(visitor: Visitor, chosen: str | None, known: list[str]) -> tuple[Any, ...]:
        seen = site.watch.seen()
        models = sorted(seen.models)
        choice = (
            gr.skip()
            if models == known
            else gr.update(choices=models, value=chosen if chosen in models else next(iter(models), None))
        )
        return *listed(seen), choice, show_works(site.works.listed()), models

    @handler(Role.VIEWER)
    def weights(visitor: Visitor, engine: EngineChoice) -> Any:
        return gr.update(choices=list(forms(engine)), value=forms(engine)[0])

    @handler(Role.VIEWER)
    def told(visitor: Visitor, *given: Any) -> str:
        return _command(*given)

    @handler(Role.USER)
    def checked(visitor: Visitor, *given: Any) -> Iterator[str]:
        asked = conf(given)
        yield note("Checking the model's files …")
        yield _cost(estimate(asked))

    @handler(Role.USER)
    def begin(visitor: Visitor, *given: Any) -> Iterator[tuple[Any, ...]]:
        asked = conf(given)
        (served,) = asked.models
        # Not in `progress`, which every tick of the timer writes anew: the answer must stay to be read.
        yield note("Checking whether there is room for it …"), gr.skip()
        found = estimate(asked)
        yield _cost(found, "Nothing was loaded: "), gr.skip()
        if any(entry.problem for entry in found):
            return
        work = site.works.begin(
            f"Deploy {served}",
            visitor.name,
            serving.deploy,
            asked,
            site.home,
            then=partial(site.watch.seen, fresh=True),
        )
        for _ in work.looks():
            yield gr.skip(), show_works([work])

    @handler(Role.USER)
    def ask_first(visitor: Visitor, chosen: str | None) -> tuple[Any, str]:
        if not chosen:
            raise ConfError("Choose a deployed model first.")
        return gr.update(visible=True), note(
            f"Stop {chosen}? Its requests in progress are completed first; then clients get errors for it."
        )

    @handler(Role.VIEWER)
    def keep(visitor: Visitor) -> Any:
        return gr.update(visible=False)

    @handler(Role.USER)
    def end(visitor: Visitor, chosen: str | None) -> Iterator[tuple[Any, str]]:
        if not chosen:
            raise ConfError("Choose a deployed model first.")
        call = partial(serving.stop, address=site.address)
        work = site.works.begin(
            f"Stop {chosen}", visitor.name, call, [chosen], site.home, then=partial(site.watch.seen, fresh=True)
        )
        for _ in work.looks(0.5):
            yield gr.update(visible=False), show_works([work])

    @handler(Role.VIEWER)
    def examples(visitor: Visitor, chosen: str | None) -> tuple[str, str, str]:
        return _examples(site.watch.seen(), chosen)

    given: list[Any] = [model, name, engine, form, cpus, replicas, adapters, length, port]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    snippets = [curl, python, openai]
    wanted = "() => [new URLSearchParams(location.search).get('model') || '']"
    outputs = [model, adapters, deployed, endpoint, chosen, *snippets, progress, known]
    on(on_load(), look, first, outputs, js=wanted, **quiet)
    on(gr.Timer(LOOK_AGAIN).tick, again, [chosen, known], [deployed, endpoint, chosen, progress, known], **quiet)
    on(engine.change, weights, engine, form, **quiet)
    for part in given:
        on(part.change, told, given, command, **quiet)
    on(check.click, checked, given, cost, **quiet)
    on(start.click, begin, given, [cost, progress], at_once=16, **quiet)
    on(stop.click, ask_first, chosen, [sure, really], **quiet)
    on(no.click, keep, None, sure, **quiet)
    on(yes.click, end, chosen, [sure, progress], **quiet)
    on(chosen.change, examples, chosen, snippets, **quiet)


def _cost(found: list[serving.Estimate], said_before: str = "") -> str:
    rows = []
    for entry in found:
        model = entry.model
        cores = f"{model.cpus} of its own" if model.cpus else f"{model.threads} shared"
        each, cache = model.memory_bytes / _GIB, model.kv_cache_bytes / _GIB
        room = "no" if entry.problem else "yes"
        rows.append([model.name, model.engine, f"{each:.1f} GiB", f"{cache:.2f} GiB", f"{model.max_model_len:,}", cores, model.replicas,
                     f"{each * model.replicas:.1f} GiB", room])  # fmt: skip
    columns = [
        "Model",
        "Engine",
        "Memory of a replica",
        "of it cache",
        "Tokens",
        "Cores",
        "Replicas",
        "Total memory",
        "Room for it",
    ]
    problems = "".join(note(f"{said_before}{entry.problem}", "bad") for entry in found if entry.problem)
    return table("Required resources", columns, rows, numbers=columns[2:5]) + problems


def _deployed(seen: Seen) -> str:
    if seen.away:
        return note(f"The cluster is unreachable: {seen.away}", "bad")
    if not seen.models:
        return note("Nothing is served. Choose a model above and press Deploy.")
    rows = []
    for name, entry in sorted(seen.models.items()):
        what = ", ".join(filter(None, [entry.model.engine, entry.model.precision]))
        state = entry.state.lower().replace("_", " ")
        rows.append(
            [name, what, state, f"{entry.replicas} of {entry.wanted}", entry.model.cpus or "shared", entry.reason]
        )
        rows += [[adapter, f"adapter on {name}", "", "", "", ""] for adapter in entry.model.adapters]
    return table("Deployed models", ["Name", "Engine", "State", "Replicas", "Cores", "Problem"], rows)


def _endpoint(seen: Seen) -> str:
    if not seen.overview or not seen.overview.serving.url:
        return note("The address appears when a model is deployed.")
    keys = (
        "Requests need an API key: an admin can create one on the screen Cluster."
        if seen.overview.serving.needs_keys
        else "No API key is needed."
    )
    return note(f"OpenAI API: {seen.overview.serving.url}\n{keys}")


def _examples(seen: Seen, name: str | None) -> tuple[str, str, str]:
    if not name or name not in seen.models or not seen.overview or not seen.overview.serving.url:
        return _NONE_YET, _NONE_YET, _NONE_YET
    return snippets(seen.overview.serving.url, name, seen.overview.serving.needs_keys, seen.models[name].model.task)


def snippets(url: str, name: str, key: bool, task: str) -> tuple[str, str, str]:
    """Returns the same request for curl, httpx and the openai SDK; if keys are needed, it reads LLM_RAY_API_KEY."""
    parts: dict[str, tuple[str, dict[str, Any], str, str]] = {
        "chat": (
            "chat/completions",
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
            "chat.completions",
            "message.content",
        ),
        "completions": ("completions", {"prompt": "Hello", "max_tokens": 64}, "completions", "text"),
        "embeddings": ("embeddings", {"input": "Hello"}, "embeddings", "embedding"),
    }
    path, asked, call, text = parts[task]
    body = {"model": name, **asked}
    first = "data" if task == "embeddings" else "choices"
    header = ' \\\n  -H "Authorization: Bearer $LLM_RAY_API_KEY"' if key else ""
    curl = f"curl {url}/{path}{header} \\\n  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"
    inside = "".join(f'["{part}"]' for part in text.split("."))
    auth = '    headers={"Authorization": f"Bearer {os.environ[\'LLM_RAY_API_KEY\']}"},\n' if key else ""
    python = (
        ("import os\n\n" if key else "")
        + f'import httpx\n\nanswer = httpx.post(\n    "{url}/{path}",\n{auth}    json={body!r},\n    timeout=600,\n)\n'
        + f'answer.raise_for_status()\nprint(answer.json()["{first}"][0]{inside})\n'
    )
    secret = 'os.environ["LLM_RAY_API_KEY"]' if key else '"none"'
    arguments = ", ".join(f"{argument}={value!r}" for argument, value in body.items())
    sdk = (
        ("import os\n\n" if key else "")
        + f'from openai import OpenAI\n\nclient = OpenAI(base_url="{url}", api_key={secret})\n'
        + f"answer = client.{call}.create({arguments})\nprint(answer.{first}[0].{text})\n"
    )
    return curl, python, sdk


def _converts(engine: EngineChoice) -> bool:
    return engine != "auto" and ENGINES[engine].converts


def _command(
    model: str | None,
    name: str,
    engine: EngineChoice,
    form: str,
    cpus: str,
    replicas: float | None,
    adapters: list[str] | None,
    length: str,
    port: str,
) -> str:
    import shlex

    words = ["llm-ray", "serve", "deploy", "--model", model or "NAME"]
    if name and name.strip():
        words += ["--name", name.strip()]
    words += ["--engine", engine] if engine != "auto" else []
    words += ["--weights", form] if _converts(engine) else []
    for flag, value in (
        ("--cpus", cpus),
        ("--replicas", f"{replicas:g}" if replicas and replicas != 1 else ""),
        ("--max-model-len", length),
        ("--port", port),
    ):
        words += [flag, value.strip()] if value and value.strip() else []
    for run in adapters or []:
        words += ["--adapter", f"{run}={run}"]
    more = "" if _converts(engine) or form == "auto" else f"   # and precision: {form}, which a conf says (--config)"
    return shlex.join(words) + more
