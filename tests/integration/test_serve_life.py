"""What happens to served models over time: neighbours that come and fail, deaths, sleep, the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from llm_ray.console import Reporter
from llm_ray.serve import local

LLM_RAY = Path(sys.executable).with_name("llm-ray")
Run = Callable[..., subprocess.CompletedProcess[str]]


class Home:
    """A home with an endpoint of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {**os.environ, "LLM_RAY_HOME": str(folder), "TMPDIR": str(folder)}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([LLM_RAY, *arguments], capture_output=True, text=True, check=False, timeout=300, env=self.environment)

    def deploy(self, name: str, *options: str, model: str | None = None) -> subprocess.CompletedProcess[str]:
        where = ["--model", model or str(self.model), "--name", name, "--port", str(self.port)]
        return self.run("serve", "deploy", *where, *(options or ("--cpus", "1", "--max-model-len", "512")))

    def models(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.run("serve", "status", "--json").stdout)["models"]
        return told

    def processes(self, title: str) -> list[psutil.Process]:
        root = psutil.Process(json.loads((self.folder / "serve" / "local.json").read_text())["pid"])
        found = []
        for process in root.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ends just now
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def ask(self, name: str, **more: Any) -> httpx.Response:
        body = {"model": name, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0} | more
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120, trust_env=False)


class Clients:
    """Two clients that ask a model all the time; `statuses` counts what they were told."""

    def __init__(self, home: Home, name: str) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(home, name)) for _ in range(2)]

    def _run(self, home: Home, name: str) -> None:
        while not self._ending.is_set():
            try:
                self.statuses[home.ask(name).status_code] += 1
            except httpx.HTTPError as error:
                self.statuses[type(error).__name__] += 1

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()


def _until(true: Callable[[], bool], seconds: float = 90) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)


@pytest.fixture(scope="module")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("home"), smollm2)
    deployed = made.deploy("first")
    assert deployed.returncode == 0, deployed.stderr
    yield made
    made.run("serve", "stop", "--all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpus", "99"], r"no room for broken: it needs 99 CPU(s)"),
        (["--max-model-len", "20000"], "max_model_len is 20000, but the model was made for 8192 tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_the_figures(home: Home, options: list[str], message: str) -> None:
    refused = home.deploy("broken", *options)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_neighbours_come_fail_and_go_while_the_first_answers(home: Home, tmp_path: Path) -> None:
    (replica,) = home.processes("ServeReplica:model:first")
    conf = tmp_path / "broken.yaml"
    broken = {"model": str(home.model), "max_model_len": 512, "cpus": 1, "engine_options": {"no_such_option": 1}}
    conf.write_text(json.dumps({"endpoint": {"port": home.port}, "models": {"broken": broken}}))
    with Clients(home, "first") as clients:
        failed = home.run("serve", "deploy", "--config", str(conf))
        assert (failed.returncode, "no_such_option" in failed.stderr, "Traceback" in failed.stderr) == (1, True, False)
        second = home.deploy("second")
        assert second.returncode == 0, second.stderr
    assert set(clients.statuses) == {200}
    assert home.processes("ServeReplica:model:first") == [replica]
    assert set(home.models()) == {"first", "second"}


def test_an_endpoint_that_asks_for_keys_does_so_after_a_deploy_that_does_not_mention_it(home: Home, tmp_path: Path) -> None:
    conf = tmp_path / "first.yaml"
    first = {"model": str(home.model), "max_model_len": 512, "cpus": 1}

    def deploy(keys: str) -> None:
        conf.write_text(json.dumps({"endpoint": {"port": home.port, "api_keys": keys}, "models": {"first": first}}))
        deployed = home.run("serve", "deploy", "--config", str(conf))
        assert deployed.returncode == 0, deployed.stderr

    deploy("on")
    assert home.ask("first").status_code == 401
    assert home.deploy("second").returncode == 0
    assert home.ask("first").status_code == 401
    deploy("off")
    assert home.ask("first").status_code == 200


def test_replicas_compute_on_cores_of_their_own(home: Home) -> None:
    def cores(process: psutil.Process) -> list[frozenset[int]]:
        allowed = [Path(f"/proc/{process.pid}/task/{t.id}/status").read_text() for t in process.threads()]
        lists = [line.split()[1] for text in allowed for line in text.splitlines() if line.startswith("Cpus_allowed_list")]
        return [frozenset({int(text)}) for text in lists if text.isdecimal()]

    first, second = (set(cores(home.processes(f"ServeReplica:model:{name}")[0])) for name in ("first", "second"))
    assert len(first) == len(second) == 1
    assert first != second


def test_a_killed_replica_comes_back_while_others_answer(home: Home) -> None:
    (killed,) = home.processes("ServeReplica:model:second")
    with Clients(home, "first") as others, Clients(home, "second") as clients:
        _until(lambda: clients.statuses[200] > 2)
        killed.kill()
        before = clients.statuses[200]
        _until(lambda: clients.statuses[200] > before + 4)
    assert set(others.statuses) == {200}
    assert set(clients.statuses) <= {200, 503}


@pytest.mark.parametrize("title", ["ServeController", "ProxyActor", "ServeReplica:llm-ray"])
def test_what_stands_before_the_models_is_survived(home: Home, title: str) -> None:
    replicas = home.processes("ServeReplica:model:")
    home.processes(title)[0].kill()

    def answers() -> bool:
        try:
            return home.ask("first").status_code == 200
        except httpx.HTTPError:
            return False

    _until(answers)
    _until(lambda: bool(home.processes(title)))
    assert set(home.processes("ServeReplica:model:")) == set(replicas)


def test_a_deploy_that_is_interrupted_leaves_what_was_there(home: Home) -> None:
    where = ["--model", str(home.model), "--name", "unwanted", "--port", str(home.port), "--cpus", "1", "--max-model-len", "512"]
    home.run("serve", "stop", "second")
    deploy = subprocess.Popen([LLM_RAY, "serve", "deploy", *where], stderr=subprocess.PIPE, text=True, env=home.environment)
    assert deploy.stderr
    assert any("starting" in line for line in deploy.stderr)
    deploy.send_signal(signal.SIGINT)
    assert deploy.wait(60) == 130
    _until(lambda: set(home.models()) == {"first"})
    assert home.ask("first").status_code == 200


def test_a_running_cluster_is_joined_by_its_address(home: Home, tmp_path: Path) -> None:
    ray = json.loads((home.folder / "serve" / "local.json").read_text())
    there = {**home.environment, "LLM_RAY_HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": ray["token"]}

    def run(*arguments: str) -> str:
        done = subprocess.run([LLM_RAY, "serve", *arguments], capture_output=True, text=True, check=False, timeout=300, env=there)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ["--model", str(home.model), "--name", "third", "--port", str(home.port), "--cpus", "1", "--max-model-len", "512"]
    run("deploy", *options, "--address", ray["address"])
    assert home.ask("third").status_code == 200
    assert set(json.loads(run("status", "--json", "--address", ray["address"]))["models"]) == {"first", "third"}
    run("stop", "third", "--address", ray["address"])
    assert set(home.models()) == {"first"}


def test_a_client_that_is_gone_ends_its_generation(home: Home) -> None:
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{home.url}/v1/completions",
                json={"model": "first", "prompt": "Once", "max_tokens": 480, "ignore_eos": True, "stream": stream},
                timeout=httpx.Timeout(5, read=0.7 if not stream else 0.05),
                trust_env=False,
            )
        _until(lambda: home.models()["first"]["in_progress"] == 0, 10)
        _until(lambda: home.processes("ServeReplica:model:first")[0].cpu_percent(0.5) < 50, 10)  # the answer would take it half a minute


def test_a_model_sleeps_and_is_woken_by_a_request(home: Home, tmp_path: Path) -> None:
    home.run("serve", "stop", "second")
    assert set(home.models()) == {"first"}
    conf = tmp_path / "sleeper.yaml"
    sleeper = {
        "model": str(home.model),
        "max_model_len": 512,
        "cpus": 1,
        "max_batch": 1,
        "max_queue": 1,
        "autoscale": {"min": 0, "max": 1, "idle_s": 1},
    }
    conf.write_text(json.dumps({"endpoint": {"port": home.port}, "models": {"sleeper": sleeper}}))
    deployed = home.run("serve", "deploy", "--config", str(conf))
    assert deployed.returncode == 0, deployed.stderr
    _until(lambda: not home.processes("ServeReplica:model:sleeper"))
    assert home.models()["sleeper"]["ready"] is True
    with ThreadPoolExecutor(4) as pool:  # one is computed at a time, and one may wait
        answers = list(pool.map(lambda _: home.ask("sleeper"), range(4)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 429)
    home.run("serve", "stop", "sleeper")


def test_new_weights_come_without_a_failed_request(home: Home, tmp_path: Path) -> None:
    """Under the same path, on two replicas, while clients ask."""
    folder = shutil.copytree(home.model, tmp_path / "model")
    conf = tmp_path / "pair.yaml"
    pair = {"model": str(folder), "max_model_len": 256, "kv_cache_gib": 0.1, "max_batch": 4, "replicas": 2}
    conf.write_text(json.dumps({"endpoint": {"port": home.port}, "models": {"pair": pair}}))
    deployed = home.run("serve", "deploy", "--config", str(conf))
    assert deployed.returncode == 0, deployed.stderr
    before, old = home.ask("pair").json()["choices"][0]["text"], home.processes("ServeReplica:model:pair")
    assert len(old) == 2
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, dims=0)  # each token is another's neighbour
    save_file(weights, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(folder / "model.safetensors")
    with Clients(home, "pair") as clients:
        deployed = home.run("serve", "deploy", "--config", str(conf))
    assert deployed.returncode == 0, deployed.stderr
    assert set(clients.statuses) == {200}
    assert not set(home.processes("ServeReplica:model:pair")) & set(old)
    assert home.ask("pair").json()["choices"][0]["text"] != before
    home.run("serve", "stop", "pair")


def test_the_end_waits_for_the_answers_in_progress_and_leaves_nothing(home: Home) -> None:
    root = psutil.Process(json.loads((home.folder / "serve" / "local.json").read_text())["pid"])
    started = [root, *root.children(recursive=True)]
    pieces: list[str] = []
    body = {"model": "first", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{home.url}/v1/completions", json=body, timeout=120, trust_env=False) as answer:
        lines = answer.iter_lines()
        pieces.append(next(lines))
        root.send_signal(signal.SIGTERM)
        pieces.extend(lines)
    assert [piece for piece in pieces if piece][-1] == "data: [DONE]"
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []
    assert list(home.folder.glob("llm-ray-*/r")) == []
    assert "Nothing is served" in home.run("serve", "status").stdout


def test_a_background_that_is_killed_leaves_nothing_that_the_next_does_not_clear(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(home.folder))
    started = local.start(Reporter())
    background = psutil.Process(started.pid)
    parts = background.children(recursive=True)
    background.kill()
    background.wait()
    assert local.running() is None
    again = local.start(Reporter())
    assert again.pid != background.pid
    local.end(again)
    _, alive = psutil.wait_procs(parts, timeout=60)
    assert alive == []
    assert not Path(started.session).exists()
