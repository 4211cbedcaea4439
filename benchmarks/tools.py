"""Tool calls: how often the small model calls the right function with the right arguments, before and after a finetune,
with each engine.

    python -m benchmarks tools --data glaive_toolcall.json --rows 300

Every fourth row with calls is held out. Each of its calls is requested over HTTP with the openai SDK's `tools`,
greedily, given the conversation that precedes it in the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import openai

from benchmarks.serving import ENGINES
from benchmarks.table import comparison
from benchmarks.training import conversations
from llm_ray.app.api_service import open_service
from llm_ray.app.finetune import run_finetune
from llm_ray.cli.terminal import Terminal
from llm_ray.cluster import local_ray
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import Paths, home
from llm_ray.conf.serve import Endpoint, ModelServing, ServeConf
from llm_ray.data.formats import Conversation
from llm_ray.serve.deployments.deploy import deploy, free_port, stop_all
from llm_ray.serve.deployments.plan import plan

SERVED = {
    "vllm": ENGINES["vllm fp32"],
    "openvino": ENGINES["openvino fp32"],
    "transformers": {"engine": "transformers"},
}
_KEPT_BACK = 4  # one row in this many
_LONGEST = 1024  # maximum tokens of a conversation


def split(rows: Iterable[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Splits rows into training rows and held-out ones, which contain calls."""
    train: list[Conversation] = []
    held: list[Conversation] = []
    calling = 0
    for row in rows:
        calling += (calls := bool(row.tools) and any(message.get("tool_calls") for message in row.messages))
        (held if calls and calling % _KEPT_BACK == 0 else train).append(row)
    return train, held


def questions(
    held: list[Conversation],
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, Any]]]]:
    """Yields for each turn with calls: the preceding messages in OpenAI's form, the tools, and the calls (name,
    arguments)."""
    for conversation in held:
        history: list[dict[str, Any]] = []
        waiting: list[str] = []
        for number, message in enumerate(conversation.messages):
            if calls := message.get("tool_calls"):
                wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
                yield list(history), conversation.tools or [], wanted
                waiting = [f"call_{number}_{place}" for place in range(len(calls))]
                given = [
                    {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                    for id, (name, arguments) in zip(waiting, wanted, strict=True)
                ]
                history.append({"role": "assistant", "content": message.get("content") or None, "tool_calls": given})
            elif message["role"] == "tool":
                history.append({"role": "tool", "tool_call_id": waiting.pop(0), "content": message["content"]})
            else:
                history.append({"role": message["role"], "content": message["content"]})


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures the shares of correct functions and of correct calls; skipped if the data has no calls to hold out."""
    train, held = split(islice(conversations(data), rows))
    if not held:
        return {"table": [], "skipped": f"{data.name} has no tool calls among its first {rows} rows"}
    file = work / "tools.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": c.messages} | ({"tools": c.tools} if c.tools else {}), ensure_ascii=False) + "\n"
            for c in train
        ),
        encoding="utf-8",
    )
    conf = FinetuneConf.model_validate(
        {
            "name": "tools",
            "model": {"base": str(model)},
            "paths": {"models": str(work / "models"), "runs": str(work / "runs")},
            "data": {"train": [str(file)], "max_length": _LONGEST},
            "stages": ["prepare", "train", "export"],
        }
    )
    run = run_finetune(conf, Terminal())
    asked = list(questions(held))
    found = {
        engine: {
            name: _shares(folder, options, asked, work)
            for name, folder in {"before": model, "after": run / "output"}.items()
        }
        for engine, options in SERVED.items()
    }
    table = [
        comparison(
            f"{engine}: {what}, % of {len(asked)} held-out calls, after against before",
            100 * shares["after"][key],
            100 * shares["before"][key],
            "",
            100 / len(asked),
        )
        for engine, shares in found.items()
        for key, what in {"function": "right function", "call": "right function and arguments"}.items()
    ]
    return {"ours": found, "calls": len(asked), "training rows": len(train), "table": table}


def _shares(model: Path, options: dict[str, Any], asked: list[Any], work: Path) -> dict[str, float]:
    conf = ServeConf(
        models={"m": ModelServing(model=str(model), max_model_len=2 * _LONGEST, **options)},
        paths=Paths(models=work / "models", runs=work / "runs"),
        endpoint=Endpoint(port=free_port()),
    )
    functions = calls = 0
    with local_ray():
        endpoint = deploy(plan(conf, Terminal()), conf.endpoint, home(), Terminal(), open_finetuning=open_service)
        with openai.OpenAI(
            base_url=endpoint.url, api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
        ) as client:
            for messages, tools, wanted in asked:
                answer = client.chat.completions.create(
                    model="m", messages=messages, tools=tools, temperature=0, max_tokens=256
                )
                made = [
                    (c.function.name, c.function.arguments)
                    for c in answer.choices[0].message.tool_calls or []
                    if c.type == "function"
                ]
                right = [name for name, _ in made] == [name for name, _ in wanted]
                functions += right
                calls += right and all(
                    _same(text, arguments) for (_, text), (_, arguments) in zip(made, wanted, strict=True)
                )
        stop_all(Terminal())
    return {"function": functions / len(asked), "call": calls / len(asked)}


def _same(text: str, arguments: Any) -> bool:
    try:
        return bool(json.loads(text) == arguments)
    except ValueError:
        return False
