"""A home with an endpoint, clients that ask it all the time, and a wait: for the tests of serving."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

LLM_RAY = Path(sys.executable).with_name("llm-ray")


class Home:
    """A home with an endpoint of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        own_code = str(Path(__file__).parents[2])  # the engine of a test is given a part of ours
        self.environment = {
            **os.environ,
            "LLM_RAY_HOME": str(folder),
            "TMPDIR": str(folder),
            "PYTHONPATH": own_code,
            "LLM_RAY_CONVERT_ENV": "/nowhere",  # so that engine vllm serves
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LLM_RAY, *arguments], capture_output=True, text=True, check=False, timeout=300, env=self.environment
        )

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, running."""
        return subprocess.Popen(
            [LLM_RAY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def deploy(self, name: str, *options: str, model: str | None = None) -> subprocess.CompletedProcess[str]:
        return self.run("serve", "deploy", *self.options(name, *options, model=model))

    def options(self, name: str, *options: str, model: str | None = None) -> list[str]:
        """Of `serve deploy`."""
        where = ["--model", model or str(self.model), "--name", name, "--port", str(self.port)]
        return [*where, *(options or ("--cpus", "1", "--max-model-len", "512"))]

    def models(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.run("serve", "status", "--json").stdout)["models"]
        return told

    def root(self) -> psutil.Process:
        """The process in the background, of which all others are children."""
        return psutil.Process(json.loads((self.folder / "serve" / "local.json").read_text())["pid"])

    def processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in self.root().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ends just now
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def ask(self, name: str, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=_body(name) | more, timeout=120, trust_env=False)

    @contextlib.contextmanager
    def stream(self, name: str, tokens: int) -> Iterator[Iterator[str]]:
        """The data of the events of an answer with so many tokens, which has begun."""
        body = _body(name) | {"max_tokens": tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120, trust_env=False) as answer:
            events = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            assert "choices" in json.loads(next(events))
            yield events


def _body(name: str) -> dict[str, Any]:
    return {"model": name, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


class Clients:
    """Two clients that ask a model all the time; `statuses` counts what they were told."""

    def __init__(self, home: Home, name: str, **more: Any) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(home, name, more)) for _ in range(2)]

    def _run(self, home: Home, name: str, more: dict[str, Any]) -> None:
        while not self._ending.is_set():
            try:
                told = outcome(home.ask(name, **more))
            except httpx.HTTPError as error:
                told = type(error).__name__
            self.statuses[told] += 1
            self._ending.wait(0.1)  # to ask hundreds of times a second would take the cores from what is to be seen

    def lost(self) -> int:
        """Requests that were not answered."""
        return self.statuses.total() - self.statuses[200]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()


def outcome(answer: httpx.Response) -> int | str:
    """What an answer is to its client: a status; of a stream that is not whole the code of its error, `cut off` where
    it has none."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        return answer.status_code
    return ending([line.removeprefix("data: ") for line in answer.text.splitlines() if line])


def ending(events: list[str]) -> int | str:
    """How a stream ended; `events` are their data."""
    if events[-1] == "[DONE]" and '"finish_reason":"' in "".join(events[-2:]):
        return 200
    with contextlib.suppress(ValueError):
        if error := json.loads(events[-1]).get("error"):
            return str(error["code"])
    return "cut off"
