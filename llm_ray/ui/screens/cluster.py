"""The screen Cluster: hosts, jobs and deployments; for admins also API keys and actions on the cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import gradio as gr

from llm_ray.app import cluster, keys, serving
from llm_ray.errors import ConfError
from llm_ray.ui.fields import optional, whole
from llm_ray.ui.figures import note, table
from llm_ray.ui.handlers import handler, on, on_load
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role
from llm_ray.ui.watch import LOOK_AGAIN, Seen

if TYPE_CHECKING:
    from llm_ray.ui.screens import Site

_DRAIN_SECONDS = 600
_COUNTS = ("requests", "errors", "in_progress", "prompt_tokens", "generated_tokens", "tokens_per_second")


def build(site: Site) -> None:
    """Creates the screen's components."""
    overview = gr.HTML(elem_id="cluster-overview")
    gr.Markdown("## Manage\nFor admins. Each change asks for confirmation.")
    with gr.Row():
        model = gr.Dropdown([], label="Deployed model")
        restart = gr.Button("Restart it …")
    with gr.Row():
        node = gr.Dropdown([], label="Worker", info="A host of the cluster that is not its head")
        drain = gr.Button("Drain it …")
    gr.Markdown("## API keys")
    listed = gr.HTML(note("Admins see the keys here."), elem_id="cluster-keys")
    show = gr.Button("Show the keys")
    with gr.Row():
        name = gr.Textbox(label="New key's name", info="Name of its person or program")
        rate = optional("Requests a minute", "Empty: unlimited")
        days = optional("Ends after days", "Empty: never")
        scopes = gr.CheckboxGroup(
            list(get_args(keys.Scope)),
            value=list(keys.USUAL_SCOPES),
            label="It may",
            info="ask models; train by the fine-tuning API; admin: both, and its jobs go before others'",
        )
        add = gr.Button("Add a key …")
    secret = gr.Textbox(
        label="The new key",
        info="Shown only once: copy it now",
        interactive=False,
        visible=False,
        buttons=["copy"],
        elem_id="cluster-secret",
    )
    with gr.Row():
        key = gr.Dropdown([], label="Key")
        revoke = gr.Button("Revoke it …", variant="stop")
    with gr.Group(visible=False, elem_id="cluster-sure") as sure:
        really = gr.HTML()
        with gr.Row():
            yes, no = gr.Button("Do it", variant="stop"), gr.Button("Leave it")
    progress = gr.HTML(elem_id="cluster-progress")
    known, asked = gr.State([]), gr.State([])
    file = keys.keys_file(site.home)

    def hosts(seen: Seen) -> list[tuple[str, str]]:
        nodes = seen.overview.state["nodes"] if seen.overview else []
        return [
            (f"{entry['host']} ({entry['address']})", entry["address"])
            for entry in nodes
            if not entry["head"] and not entry["draining"]
        ]

    def keys_now() -> tuple[str, Any]:
        found = keys.list_keys(file)
        return _keys(found), gr.update(
            choices=[(f"{entry.name} ({entry.id})", entry.id) for entry in found], value=None
        )

    @handler(Role.VIEWER)
    def look(visitor: Visitor, known: list[Any]) -> tuple[Any, ...]:
        seen = site.watch.seen()
        now = [sorted(seen.models), hosts(seen)]
        choices = (
            (gr.skip(), gr.skip())
            if now == known
            else (gr.update(choices=now[0], value=None), gr.update(choices=now[1], value=None))
        )
        return _overview(seen), *choices, now

    @handler(Role.ADMIN)
    def show_keys(visitor: Visitor) -> tuple[str, Any]:
        return keys_now()

    def ask(what: str, value: Any, missing: str, text: str) -> tuple[Any, str, list[Any]]:
        if not value or not str(value).strip():
            raise ConfError(missing)
        return gr.update(visible=True), note(text), [what, value]

    @handler(Role.ADMIN)
    def ask_restart(visitor: Visitor, model: str | None) -> tuple[Any, str, list[Any]]:
        text = (
            f"Restart {model}? Its requests in progress are completed first; until it is ready again, clients get "
            "errors for it."
        )
        return ask("restart", model, "Choose a deployed model first.", text)

    @handler(Role.ADMIN)
    def ask_drain(visitor: Visitor, node: str | None) -> tuple[Any, str, list[Any]]:
        text = (
            f"Drain {node}? It accepts no more work, and its Ray stops when its running work has ended, after at "
            f"most {_DRAIN_SECONDS // 60} minutes. Use the playbook remove_node to remove it from the cluster "
            "permanently."
        )
        return ask("drain", node, "Choose a worker first. A cluster of one host has none.", text)

    @handler(Role.ADMIN)
    def ask_add(
        visitor: Visitor, name: str, rate: str, days: str, scopes: list[keys.Scope]
    ) -> tuple[Any, str, list[Any]]:
        if not scopes:
            raise ConfError("Choose what the key may do first.")
        found = ask(
            "add",
            name,
            "Give the key a name first.",
            f"Create a key called {name}? Whoever has it may {' and '.join(scopes)}, with every model.",
        )
        return (
            found[0],
            found[1],
            ["add", [name.strip(), whole(rate, "Requests a minute"), whole(days, "Ends after days"), scopes]],
        )

    @handler(Role.ADMIN)
    def ask_revoke(visitor: Visitor, key: str | None) -> tuple[Any, str, list[Any]]:
        return ask(
            "revoke", key, "Choose a key first.", f"Revoke the key {key}? It stops working immediately and permanently."
        )

    @handler(Role.VIEWER)
    def leave(visitor: Visitor) -> tuple[Any, list[Any]]:
        return gr.update(visible=False), []

    @handler(Role.ADMIN)
    def do(visitor: Visitor, asked: list[Any]) -> Iterator[tuple[Any, ...]]:
        """Outputs: sure, asked, progress, secret, listed, key."""
        if not asked:
            raise ConfError("There is nothing to confirm: choose an action first.")
        what, value = asked
        away, same = gr.update(visible=False), gr.skip()
        if what == "add":
            name, rate, days, scopes = value
            limits, until = keys.Limits(requests_per_minute=rate), time.time() + days * 86400 if days else None
            made, secret = keys.add_key(file, name, limits, None, until, tuple(scopes))
            yield (
                away,
                [],
                note(f"The key {made.name} has been created."),
                gr.update(value=secret, visible=True),
                *keys_now(),
            )
            return
        if what == "revoke":
            gone = keys.revoke_key(file, value)
            yield away, [], note(f"The key {gone.name} is revoked."), gr.update(value="", visible=False), *keys_now()
            return
        call: partial[Any]
        if what == "restart":
            title, call = f"Restart {value}", partial(serving.restart, address=site.address)
            arguments: tuple[Any, ...] = (value, site.home)
        else:
            title, call = f"Drain {value}", partial(cluster.drain, address=site.address)
            arguments = (value, _DRAIN_SECONDS, site.home)
        work = site.works.begin(title, visitor.name, call, *arguments, then=partial(site.watch.seen, fresh=True))
        for _ in work.looks():
            lines = "\n".join([f"{work.title}: {work.state}", *work.lines[-3:], work.problem]).strip()
            yield away, [], note(lines, "bad" if work.problem else ""), same, same, same

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    for event in (on_load(), gr.Timer(LOOK_AGAIN).tick):
        on(event, look, known, [overview, model, node, known], **quiet)
    on(show.click, show_keys, None, [listed, key], **quiet)
    on(restart.click, ask_restart, model, [sure, really, asked], **quiet)
    on(drain.click, ask_drain, node, [sure, really, asked], **quiet)
    on(add.click, ask_add, [name, rate, days, scopes], [sure, really, asked], **quiet)
    on(revoke.click, ask_revoke, key, [sure, really, asked], **quiet)
    on(no.click, leave, None, [sure, asked], **quiet)
    on(yes.click, do, asked, [sure, asked, progress, secret, listed, key], **quiet)


def _overview(seen: Seen) -> str:
    if seen.away:
        return note(
            f"The cluster is unreachable: {seen.away}\nThe page checks every few seconds, and shows it when it is "
            "back.",
            "bad",
        )
    if seen.overview is None:
        return note(
            "Nothing is served on this machine, and no Ray is running: start both on the screen Deploy, or in a "
            "terminal: llm-ray serve deploy --model NAME\nTo see a cluster, run the page on one of its nodes: "
            "llm-ray ui --address auto"
        )
    state = seen.overview.state
    nodes = [
        [
            f"{node['host']}{' (head)' if node['head'] else ''}{', drains' if node['draining'] else ''}",
            node["address"],
            f"{node['cpus_used']:g} of {node['cpus']:g}",
            f"{node['memory_gib_used']:g} of {node['memory_gib']:g}",
            f"{node['object_store_gib_used']:g} of {node['object_store_gib']:g}",
            ", ".join(seen.overview.models_on.get(node["id"], [])) or "no model",
        ]
        for node in state["nodes"]
    ]
    jobs = [[job["id"], job["status"].lower(), job["since"], job["command"]] for job in state["jobs"]]
    models = [
        [
            name,
            entry.state.lower().replace("_", " "),
            f"{entry.replicas} of {entry.wanted}",
            entry.model.max_queue,
            *_counted(entry.counts),
        ]
        for name, entry in sorted(seen.models.items())
    ]
    columns = [
        "Model",
        "State",
        "Replicas",
        "Queue's room",
        "Requests",
        "Failed",
        "In progress",
        "Tokens in",
        "Tokens out",
        "Tokens/s",
    ]
    parts = [
        table(
            "Hosts",
            ["Host", "Address", "Cores in use", "Memory in use, GiB", "Object store, GiB", "Models there"],
            nodes,
        ),
        table("Deployments", columns, models, numbers=columns[3:])
        if models
        else note("No model is deployed: deploy one on the screen Deploy."),
        table("Jobs", ["Job", "State", "Since", "Command"], jobs) if jobs else note("No jobs are running."),
        note(f"Ray {state['ray']}; the same in a terminal: llm-ray status, llm-ray serve status"),
    ]
    return "".join(parts)


def _counted(counts: dict[str, float]) -> list[str]:
    return [
        f"{counts.get(count, 0):,.0f}" if count != "tokens_per_second" else f"{counts.get(count, 0):,.1f}"
        for count in _COUNTS
    ]


def _keys(found: list[keys.Key]) -> str:
    def day(at: float | None) -> str:
        return time.strftime("%Y-%m-%d", time.localtime(at)) if at else "never"

    rows = [
        [
            entry.name,
            entry.id,
            day(entry.created),
            f"{day(entry.expires)}{' (it has)' if entry.expired else ''}",
            ", ".join(entry.scopes),
            ", ".join(entry.models) if entry.models else "all",
            entry.limits.requests_per_minute or "no limit",
        ]
        for entry in found
    ]
    if not rows:
        return note("There are no keys yet.")
    return table("API keys", ["Name", "Id", "Made", "Ends", "May", "Models", "Requests a minute"], rows)
