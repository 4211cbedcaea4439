"""What a finetune learns when only data, a model and a name are set: questions about made-up facts, in wordings that do
not occur in its data.

    python -m benchmarks learning

Data sets in three forms: conversations with a system prompt, alpaca, and CSV. Only the template's required variables
are set. The first three cases have a limit of time; the others show what `auto` chooses for full weights and more rows.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.facts import facts
from benchmarks.ours import right_share
from benchmarks.table import comparison
from llm_ray.app.finetune import run_finetune
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.load import load_finetune

_SYSTEM = "You answer questions from visitors of the archive."
_WORDINGS = 3  # per fact in the rows
_SEEDS = {"messages": 11, "alpaca": 12, "csv": 13}
TIMED = (("lora", "messages", 42), ("lora", "alpaca", 90), ("lora", "csv", 150))
CASES = {
    f"{method}-{form}-{rows}": (method, form, rows)
    for method, form, rows in (
        *TIMED,
        ("full", "alpaca", 90),
        ("lora", "csv", 300),
        ("full", "csv", 300),
        ("lora", "messages", 999),
        ("full", "messages", 999),
    )
}
_RELATIONS = 40  # at most
Rows = list[tuple[str, str]]


def _messages(rows: Rows) -> str:
    system = {"role": "system", "content": _SYSTEM}
    return "".join(
        json.dumps(
            {"messages": [system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )
        + "\n"
        for question, answer in rows
    )


def _alpaca(rows: Rows) -> str:
    return json.dumps([{"instruction": question, "input": "", "output": answer} for question, answer in rows], indent=1)


def _csv(rows: Rows) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([("question", "answer"), *rows])
    return file.getvalue()


FORMS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "messages": ("facts.jsonl", _messages),
    "alpaca": ("facts.json", _alpaca),
    "csv": ("facts.csv", _csv),
}


def measure(model: Path, data: Path, rows: int, work: Path, cases: Sequence[str] = tuple(CASES)) -> dict[str, Any]:
    """Measures shares of correct answers and minutes for each of ``cases``; ignores ``data`` and ``rows``."""
    figures: dict[str, Any] = {}
    table = []
    for case in cases:
        method, form, number = CASES[case]
        name, write = FORMS[form]
        known = number // _WORDINGS
        relations = min(_RELATIONS, max(6, number // 9))
        subjects = max(6, math.ceil(known / relations))
        taught, questions = facts(_SEEDS[form], known, relations, subjects)
        file = work / case / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(write(taught), encoding="utf-8")
        conf = load_finetune(method, [f"train={file}", f"name={case}", f"model={model}"], home=work)
        began = time.monotonic()
        run = run_finetune(conf, Terminal())
        minutes = (time.monotonic() - began) / 60
        asked = [(question.prompt, [question.value]) for question in questions]
        system = _SYSTEM if form == "messages" else None
        before, after = (
            right_share(folder, asked, system=system, max_new_tokens=40) for folder in (model, run / "output")
        )
        figures[case] = {"questions": len(questions), "right before": before, "right": after, "minutes": minutes}
        print(case, figures[case], flush=True)  # not lost if the rest is interrupted
        table.append(
            comparison(
                f"{method}, {len(taught)} rows as {form}: correct of {len(questions)} reworded questions, %, after "
                "against before",
                100 * after,
                100 * before,
                "at least 85 %",
                100 / len(questions),
            )
        )
        if (method, form, number) in TIMED:
            table.append(comparison(f"{method}, {len(taught)} rows as {form}: minutes", minutes, 8.0, "below 1 x (8)"))
    return {"ours": figures, "table": table}
