"""The rounds of the league: each starts, loads and stops every server, one after the other.

Servers run one at a time, so that none takes cores or memory from another; each round begins with a different server.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.league import quality
from benchmarks.league.processes import Launch, Running, running
from benchmarks.league.servers import MODEL, SERVERS, Setting, Unavailable, Weights
from benchmarks.league.weights import step_bytes
from llm_ray.bench.load import Load, LoadReport, Spread, run_load
from llm_ray.bench.prompts import SENTENCES, builtin_prompts
from llm_ray.client.endpoint import parse
from llm_ray.client.errors import Failed
from llm_ray.client.prompts import Prompt
from llm_ray.errors import RunError
from llm_ray.files import write_json
from llm_ray.models.folder import CONFIG, read_json
from llm_ray.serve.deployments.deploy import free_port

PREFIX = 256
"""Tokens of the shared system prompt."""
_LEAST = 4  # minimum requests
_START_SECONDS = 900.0
_POLL = 0.1
_ANSWER_SECONDS = 3600.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """A load: concurrent requests, prompt length in tokens, and whether all prompts follow a shared system prompt of
    `PREFIX` more tokens."""

    concurrency: int
    prompt: int
    shared: bool

    @property
    def requests(self) -> int:
        """Twice the concurrency, so that prompts and answers overlap as in production."""
        return max(_LEAST, 2 * self.concurrency)

    def __str__(self) -> str:
        return f"{self.concurrency} concurrent, {f'{PREFIX}+' if self.shared else ''}{self.prompt} tokens"


class Stopped(Exception):
    """A server gave no figures."""


class Prompts:
    """Prompts with an exact number of tokens and distinct beginnings, determined by `seed`."""

    def __init__(self, model: Path, longest: int, seed: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._texts = builtin_prompts(2 * longest, seed)
        self._prefix = self._cut(" ".join(SENTENCES), PREFIX - 1) + "\n"

    def take(self, cell: Cell, number: int) -> list[Prompt]:
        before = self._prefix if cell.shared else ""
        return [Prompt(before + self._cut(str(next(self._texts).content), cell.prompt)) for _ in range(number)]

    def _cut(self, text: str, tokens: int) -> str:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(self._tokenizer.decode(ids[:tokens]))


@dataclass
class League:
    """A run: what to measure, and the results so far, which are always saved in `file`. Every answer has `answer`
    tokens; perplexity is computed on the first `text_tokens` of `text`."""

    setting: Setting
    names: tuple[str, ...]
    cells: tuple[Cell, ...]
    rounds: int
    answer: int
    text: Path
    text_tokens: int
    folder: Path
    results: dict[str, Any]
    say: Say

    @property
    def file(self) -> Path:
        return self.folder / "league.json"

    def run(self) -> None:
        """Runs all rounds. For measurements that fail, the results have a reason. Raises ConfError for an unusable
        text, RunError if the machine's limits cannot be measured."""
        tokens = quality.tokens_of(self.text, self.setting.model, self.text_tokens)
        ready = {name: weights for name in self.names if (weights := self._prepare(name))}
        self._qualities(ready, tokens)
        for number in range(self.rounds):
            self.results["limits"].append(self._limits())
            first = number % len(ready) if ready else 0
            for name in [*ready][first:] + [*ready][:first]:
                if "reason" not in self.results["servers"][name]:
                    self.say(f"round {number + 1} of {self.rounds}: {name}")
                    self._round(name, ready[name], number)

    def _keep(self) -> None:
        write_json(self.file, self.results)

    def _prepare(self, name: str) -> Weights | None:
        server = SERVERS[name]
        entry: dict[str, Any] = {"form": server.form, "arithmetic": server.arithmetic, "starts": [], "rows": []}
        self.results["servers"][name] = entry
        self.say(f"preparing {name}")
        try:
            weights = server.prepare(self.setting)
        except Unavailable as error:
            entry["reason"] = str(error)
            self.say(f"{name} cannot take part: {error}")
            return None
        entry |= {"stored_bytes": weights.stored, "step_bytes": step_bytes(self.setting.shape, weights.stored)}
        launch = server.launch(self.setting, weights.path, 0)
        entry |= {"command": list(launch.command), "environment": dict(launch.environment)}
        self._keep()
        return weights

    def _qualities(self, ready: dict[str, Weights], tokens: list[int]) -> None:
        file = self.setting.work / "tokens.json"
        file.write_text(json.dumps(tokens), encoding="utf-8")
        known: dict[tuple[str, Path], tuple[str, float | str]] = {}
        for name, weights in ready.items():
            key = (weights.library, weights.path)
            if key not in known:
                self.say(f"perplexity of {name}")
                try:
                    known[key] = "perplexity", self._quality(name, weights, tokens, file)
                except (quality.Failed, Stopped) as error:
                    known[key] = "no_perplexity", str(error)
                    self.say(f"no perplexity of {name}: {error}")
            field, value = known[key]
            self.results["servers"][name] |= {field: value, "perplexity_by": weights.library}
        self._keep()

    def _quality(self, name: str, weights: Weights, tokens: list[int], file: Path) -> float:
        if weights.library != "llama.cpp":
            return quality.offline(weights.library, weights.path, file)
        config = read_json(self.setting.model / CONFIG)
        log = self.folder / "logs" / f"{name}-perplexity.log"
        # Only one slot, so that each request finds its preceding tokens cached.
        alone = replace(self.setting, at_once=1, context=max(self.setting.context, len(tokens) + 1))
        port = free_port()
        with running(SERVERS[name].launch(alone, weights.path, port), log) as server:
            first_token(server, port, log)
            return quality.over_http(f"http://127.0.0.1:{port}", tokens, config["vocab_size"])

    def _limits(self) -> dict[str, Any]:
        self.say("limits of the machine")
        command = [sys.executable, "-m", "benchmarks.league.limits", "--threads", str(len(self.setting.cores))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RunError(
                f"the limits of this machine cannot be measured: {why}. What was measured before is in {self.file}"
            )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _round(self, name: str, weights: Weights, number: int) -> None:
        entry, port = self.results["servers"][name], free_port()
        launch: Launch = SERVERS[name].launch(self.setting, weights.path, port)
        log = self.folder / "logs" / f"{name}-{number + 1}.log"
        prompts = Prompts(self.setting.model, max(cell.prompt for cell in self.cells), number)
        try:
            with running(launch, log) as server:
                seconds = first_token(server, port, log)
                entry["starts"].append({"round": number, "seconds_to_first_token": seconds})
                for cell in self.cells:
                    self.say(f"  {cell}")
                    found = _measure(server, port, cell, prompts, self.answer)
                    entry["rows"].append({"round": number, **asdict(cell), **found})
                    self._keep()
                    if server.ended:
                        raise Stopped(f"it ended during the load: {last_words(log)}")
        except (OSError, Stopped) as error:
            if not entry["starts"]:
                entry["reason"] = str(error)  # it would not start in the next round either
            entry.setdefault("failures", []).append({"round": number, "reason": str(error)})
            self.say(f"{name}: {error}")
        self._keep()


def first_token(server: Running, port: int, log: Path) -> float:
    """Returns the seconds from the command to the first token. Raises Stopped."""
    began, url = server.process.create_time(), parse(f"http://127.0.0.1:{port}/v1")
    one = Load(concurrency=1, requests=1, max_tokens=1, completion=True, warmup=0, timeout=_START_SECONDS)
    while True:
        report = run_load(url, MODEL, itertools.repeat(Prompt("Once")), one)
        if report.samples:
            return time.time() - began
        if server.ended:
            raise Stopped(f"it ended while it started: {last_words(log)}")
        if time.time() - began > _START_SECONDS:
            raise Stopped(f"no answer within {_START_SECONDS:.0f} s: {report.failures[0].message}")
        time.sleep(_POLL)


def last_words(log: Path) -> str:
    """Returns the last error in a server's log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["it wrote nothing"])[-1]


def _measure(server: Running, port: int, cell: Cell, prompts: Prompts, answer: int) -> dict[str, Any]:
    """Returns the figures of a load, or the reason for their absence."""
    url, queue = parse(f"http://127.0.0.1:{port}/v1"), iter(prompts.take(cell, cell.requests + 1))
    load = Load(
        concurrency=cell.concurrency,
        requests=cell.requests,
        max_tokens=answer,
        ignore_eos=True,
        completion=True,
        warmup=0,
        timeout=_ANSWER_SECONDS,
        keep_alive=False,  # llama.cpp's server closes a connection after each stream
    )
    try:
        warm = run_load(url, MODEL, queue, replace(load, concurrency=1, requests=1))
        if warm.failures:
            return {"reason": warm.failures[0].message}
        cpu = server.cpu_seconds()
        report = run_load(url, MODEL, queue, load)
        return figures(report, server.cpu_seconds() - cpu) | {"memory_bytes": server.memory()}
    except Failed as error:
        return {"reason": str(error)}


def figures(report: LoadReport, cpu_seconds: float) -> dict[str, Any]:
    """Returns the figures of a load; times in seconds."""
    if not report.samples:
        return {"reason": report.failures[0].message}
    row = {
        "output_tokens_per_second": report.output_tokens_per_second,
        "prompt_tokens_per_request": report.prompt_tokens / len(report.samples),
        "output_tokens_per_request": report.output_tokens / len(report.samples),
        "cpu_seconds_per_1000_tokens": 1000 * cpu_seconds / report.output_tokens,
        "client_cpu_share": report.client_cpu_share,
        "failed": len(report.failures),
        "failures": {failure.kind: failure.message for failure in report.failures},
    }
    return (
        row
        | dict(_percentiles("ttft", report.time_to_first_token))
        | dict(_percentiles("tpot", report.time_per_output_token))
    )


def _percentiles(name: str, spread: Spread | None) -> Iterator[tuple[str, float]]:
    if spread:
        yield from ((f"{name}_{key}", getattr(spread, key)) for key in ("p50", "p95", "p99"))
