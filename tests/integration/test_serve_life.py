"""What happens to served models over time: neighbours that come and fail, deaths, sleep, the end."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from llm_ray.progress import Silent
from llm_ray.serve.deployments import local
from tests.integration.deadly import DEADLY, Deadly
from tests.integration.serving import LLM_RAY, Clients, Home, ending, outcome
from tests.integration.tiny import llama
from tests.waiting import until

LONG = ("--cpus", "1", "--max-model-len", "8192")


@pytest.fixture(scope="module")
def home(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("home"), Path(tiny))
    deployed = made.deploy("first", *LONG)
    assert deployed.returncode == 0, deployed.stderr
    yield made
    made.run("serve", "stop", "--all")


def _deploy(home: Home, name: str, model: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Deploy a model with settings that the command has no options for."""
    conf = home.folder / f"{name}.yaml"
    conf.write_text(
        json.dumps({"endpoint": {"port": home.port}, "models": {name: {"model": model, "cpus": 1} | settings}})
    )
    return home.run("serve", "deploy", "--config", str(conf))


def _deploy_second(home: Home, model: str) -> None:
    """A model whose engine can be ended by a prompt."""
    options = {"logits_processors": [f"{Deadly.__module__}:{Deadly.__name__}"]}
    deployed = _deploy(home, "second", model, max_model_len=8192, engine_options=options)
    assert deployed.returncode == 0, deployed.stderr


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """It does not matter here what is answered."""
    return str(llama(tmp_path_factory.mktemp("tiny"), smollm2, max_position_embeddings=8192))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpus", "99"], r"no room for broken: it needs 99 CPU(s)"),
        (["--max-model-len", "20000"], "max_model_len is 20000, but the model supports 8192 tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_the_figures(home: Home, options: list[str], message: str) -> None:
    refused = home.deploy("broken", *options)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_neighbours_come_fail_and_go_while_the_first_answers(home: Home, tiny: str) -> None:
    (replica,) = home.processes("ServeReplica:model:first")
    with Clients(home, "first") as clients:
        failed = _deploy(home, "broken", tiny, max_model_len=512, engine_options={"no_such_option": 1})
        assert (failed.returncode, "no_such_option" in failed.stderr, "Traceback" in failed.stderr) == (1, True, False)
        _deploy_second(home, tiny)
    assert set(clients.statuses) == {200}
    assert home.processes("ServeReplica:model:first") == [replica]
    told = home.models()
    assert set(told) == {"first", "second"}
    assert told["first"]["requests"] == clients.statuses[200]
    assert told["first"]["tokens_per_second"] > 0


def test_an_endpoint_that_asks_for_keys_does_so_after_a_deploy_that_does_not_mention_it(
    home: Home, tiny: str, tmp_path: Path
) -> None:
    conf = tmp_path / "first.yaml"
    first = {"model": str(home.model), "max_model_len": 8192, "cpus": 1}

    def deploy(keys: str) -> None:
        conf.write_text(json.dumps({"endpoint": {"port": home.port, "api_keys": keys}, "models": {"first": first}}))
        deployed = home.run("serve", "deploy", "--config", str(conf))
        assert deployed.returncode == 0, deployed.stderr

    deploy("on")
    assert home.ask("first").status_code == 401
    _deploy_second(home, tiny)
    assert home.ask("first").status_code == 401
    deploy("off")
    assert home.ask("first").status_code == 200


def test_replicas_compute_on_cores_of_their_own(home: Home) -> None:
    def cores(process: psutil.Process) -> list[frozenset[int]]:
        allowed = [Path(f"/proc/{process.pid}/task/{t.id}/status").read_text() for t in process.threads()]
        lists = [
            line.split()[1] for text in allowed for line in text.splitlines() if line.startswith("Cpus_allowed_list")
        ]
        return [frozenset({int(text)}) for text in lists if text.isdecimal()]

    first, second = (set(cores(home.processes(f"ServeReplica:model:{name}")[0])) for name in ("first", "second"))
    assert len(first) == len(second) == 1
    assert first != second
    assert not home.processes("TelemetryAgent"), "a process of 0.4 GB that ray.serve.llm would start"


def test_a_killed_replica_comes_back_while_others_answer(home: Home) -> None:
    (killed,) = home.processes("ServeReplica:model:second")
    with (
        Clients(home, "first") as others,
        Clients(home, "second") as clients,
        Clients(home, "second", stream=True, max_tokens=100) as readers,
        home.stream("second", 8000) as events,
    ):
        until(lambda: min(clients.statuses[200], readers.statuses[200]) > 2)
        killed.kill()
        seen = ending(list(events))
        before = clients.statuses[200]
        until(lambda: clients.statuses[200] > before + 4)
    assert seen == "replica_lost"
    assert set(others.statuses) == {200}
    assert set(clients.statuses) <= {200, 503}
    assert set(readers.statuses) <= {200, 503, "replica_lost"}
    assert max(clients.lost(), readers.lost()) <= 2  # what they waited for when it died


def test_an_engine_that_dies_is_told_and_replaced(home: Home) -> None:
    (ill,) = home.processes("ServeReplica:model:second")
    with Clients(home, "first") as others, Clients(home, "second") as clients, home.stream("second", 8000) as events:
        until(lambda: clients.statuses[200] > 2)
        deadly = home.ask("second", prompt=[DEADLY])
        seen = ending(list(events))
        before = clients.statuses[200]
        until(lambda: clients.statuses[200] > before + 4)
    assert (outcome(deadly), deadly.json()["error"]["code"]) == (503, "engine_failed")
    assert seen == "engine_failed"
    assert set(others.statuses) == {200}
    assert set(clients.statuses) <= {200, 503}
    assert ill not in home.processes("ServeReplica:model:second")
    assert "another is started: ArithmeticError: the deadly token" in home.run("serve", "logs", "second").stdout


@pytest.mark.parametrize(
    ("title", "lost", "streamed"),
    [
        ("ServeController", set(), 200),
        pytest.param("ServeReplica:llm-ray", {503}, "gateway_lost", marks=pytest.mark.long),
        ("ProxyActor", {503, "ConnectError", "ReadError", "RemoteProtocolError"}, "RemoteProtocolError"),
    ],
)
def test_what_stands_before_the_models_is_survived(
    home: Home, title: str, lost: set[int | str], streamed: int | str
) -> None:
    replicas = home.processes("ServeReplica:model:")
    (killed,) = home.processes(title)
    seen: int | str
    with Clients(home, "first") as clients, home.stream("second", 2000) as events:
        until(lambda: clients.statuses[200] > 2)
        killed.kill()
        try:
            seen = ending(list(events))
        except httpx.HTTPError as error:
            seen = type(error).__name__
        until(lambda: any(process != killed for process in home.processes(title)))
        before = clients.statuses[200]
        until(lambda: clients.statuses[200] > before + 2)
    assert seen == streamed
    assert set(clients.statuses) <= {200} | lost
    assert set(home.processes("ServeReplica:model:")) == set(replicas)


def test_logs_are_followed_until_ctrl_c(home: Home) -> None:
    following = home.begin("serve", "logs", "gateway", "-f", "-n", "1")
    assert following.stdout
    assert next(following.stdout)
    asked = home.ask("first").headers["x-request-id"]
    assert any(asked in line for line in following.stdout)
    following.send_signal(signal.SIGINT)
    _, said = following.communicate(timeout=60)
    assert (following.returncode, "Traceback" in said) == (130, False)


def test_slow_and_half_open_clients_do_not_hold_up_others(home: Home) -> None:
    with contextlib.ExitStack() as stack:
        for begun in (
            b"",
            b"POST /v1/completions HTTP/1.1\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 99\r\n\r\n{",
        ):
            for _ in range(100):
                stack.enter_context(socket.create_connection(("127.0.0.1", home.port))).sendall(begun)
        for _ in range(4):  # more than buffers hold, and nothing of it is read
            stack.enter_context(home.stream("second", 8000))
        for name in ("first", "second"):
            assert home.ask(name).status_code == 200
    until(lambda: all(model["in_progress"] == 0 for model in home.models().values()), timeout=20)


def test_a_model_that_is_stopped_answers_what_it_has_begun(home: Home) -> None:
    with (
        Clients(home, "first") as others,
        Clients(home, "second") as clients,
        ThreadPoolExecutor() as pool,
        home.stream("second", 2000) as events,
    ):
        until(lambda: clients.statuses[200] > 2)
        reading = pool.submit(list, events)
        stopped = home.run("serve", "stop", "second")
        until(lambda: clients.statuses[404] > 2)
    assert stopped.returncode == 0, stopped.stderr
    assert ending(reading.result()) == 200
    assert set(others.statuses) == {200}
    assert set(clients.statuses) <= {200, 404, 503}


def test_a_change_that_fails_leaves_the_old_to_answer(home: Home) -> None:
    (replica,) = home.processes("ServeReplica:model:first")
    with Clients(home, "first") as clients:
        failed = _deploy(
            home, "first", str(home.model), engine_options={"logits_processors": ["no_such_module:Processor"]}
        )
    assert failed.returncode == 1
    assert "first could not be deployed" in failed.stderr
    assert "no_such_module" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert set(clients.statuses) == {200}
    assert home.processes("ServeReplica:model:first") == [replica]


def test_a_deploy_that_is_interrupted_leaves_what_was_there(home: Home) -> None:
    deploy = home.begin("serve", "deploy", *home.options("unwanted"))
    assert deploy.stderr
    said = []
    for line in deploy.stderr:
        said.append(line)
        if "starting" in line:
            break
    assert "starting" in said[-1], said
    deploy.send_signal(signal.SIGINT)
    assert deploy.wait(60) == 130
    until(lambda: set(home.models()) == {"first"})
    assert home.ask("first").status_code == 200


@pytest.mark.long  # a third model and gateway; the lab serves on a cluster
def test_a_running_cluster_is_joined_by_its_address(home: Home, tiny: str, tmp_path: Path) -> None:
    ray = json.loads((home.folder / "serve" / "local.json").read_text())
    there = {
        **home.environment,
        "LLM_RAY_HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": ray["token"],
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [LLM_RAY, "serve", *arguments], capture_output=True, text=True, check=False, timeout=300, env=there
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("deploy", *home.options("third", model=tiny), "--address", ray["address"])
    assert home.ask("third").status_code == 200
    assert set(json.loads(run("status", "--json", "--address", ray["address"]))["models"]) == {"first", "third"}
    run("stop", "third", "--address", ray["address"])
    assert set(home.models()) == {"first"}


def test_a_client_that_is_gone_ends_its_generation(home: Home) -> None:
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{home.url}/v1/completions",
                json={"model": "first", "prompt": "Once", "max_tokens": 8000, "ignore_eos": True, "stream": stream},
                timeout=httpx.Timeout(5, read=0.7 if not stream else 0.05),
                trust_env=False,
            )
        until(lambda: home.models()["first"]["in_progress"] == 0, timeout=10)
        until(
            lambda: home.processes("ServeReplica:model:first")[0].cpu_percent(0.5) < 50, timeout=10
        )  # the answer would take it half a minute


@pytest.mark.long
def test_a_model_sleeps_and_is_woken_by_a_request(home: Home, tiny: str) -> None:
    once = {"max_batch": 1, "max_queue": 1, "autoscale": {"min": 0, "max": 1, "idle_s": 1}}
    deployed = _deploy(home, "sleeper", tiny, max_model_len=512, **once)
    assert deployed.returncode == 0, deployed.stderr
    until(lambda: not home.processes("ServeReplica:model:sleeper"))
    assert home.models()["sleeper"]["ready"] is True
    with ThreadPoolExecutor(4) as pool:  # one is computed at a time, and one may wait
        answers = list(pool.map(lambda _: home.ask("sleeper"), range(4)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 429)
    home.run("serve", "stop", "sleeper")


@pytest.mark.long
def test_new_weights_come_without_a_failed_request(home: Home, tiny: str, tmp_path: Path) -> None:
    """Under the same path, on two replicas, while clients ask."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    conf = tmp_path / "pair.yaml"
    pair = {"model": str(folder), "max_model_len": 256, "kv_cache_gib": 0.1, "max_batch": 4, "replicas": 2}
    conf.write_text(json.dumps({"endpoint": {"port": home.port}, "models": {"pair": pair}}))
    deployed = home.run("serve", "deploy", "--config", str(conf))
    assert deployed.returncode == 0, deployed.stderr
    before, old = home.ask("pair").json()["choices"][0]["text"], home.processes("ServeReplica:model:pair")
    assert len(old) == 2
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(
        1, dims=0
    )  # each token is another's neighbour
    save_file(weights, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(folder / "model.safetensors")
    with Clients(home, "pair") as clients:
        deployed = home.run("serve", "deploy", "--config", str(conf))
    assert deployed.returncode == 0, deployed.stderr
    assert set(clients.statuses) == {200}
    assert not set(home.processes("ServeReplica:model:pair")) & set(old)
    assert home.ask("pair").json()["choices"][0]["text"] != before
    home.run("serve", "stop", "pair")


def _in_the_foreground(home: Home, *options: str) -> subprocess.Popen[str]:
    """`serve deploy --foreground`, which serves and stays."""
    staying = home.begin("serve", "deploy", "--foreground", *options)
    assert staying.stderr
    assert any("Ctrl-C" in line for line in staying.stderr)
    return staying


def _assert_nothing_left(home: Home, started: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []
    assert list(home.folder.glob("llm-ray-*/r")) == []


def test_the_end_waits_for_the_answers_in_progress_and_leaves_nothing(home: Home) -> None:
    watching = _in_the_foreground(home, *home.options("first", *LONG))  # as it is deployed already
    started = [home.root(), *home.root().children(recursive=True)]
    with home.stream("first", 4000) as events:
        started[0].send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{home.url}/ready", trust_env=False).status_code == 503)
        refused = home.ask("first")
        assert (outcome(refused), refused.json()["error"]["code"]) == (503, "stopping")
        assert ending(list(events)) == 200
    _assert_nothing_left(home, started)
    assert "Nothing is served" in home.run("serve", "status").stdout
    _, said = watching.communicate(timeout=60)
    assert (watching.returncode, "nothing is served any more" in said) == (1, True)


@pytest.mark.long
def test_in_the_foreground_it_serves_until_it_is_told_to_end(home: Home, tiny: str) -> None:
    serving = _in_the_foreground(home, *home.options("here", *LONG, model=tiny))
    started = [home.root(), *home.root().children(recursive=True)]
    with home.stream("here", 2000) as events:
        serving.send_signal(signal.SIGTERM)
        assert ending(list(events)) == 200
    _, said = serving.communicate(timeout=120)
    assert (serving.returncode, "Traceback" in said) == (0, False)
    _assert_nothing_left(home, started)


def test_a_background_that_is_killed_leaves_nothing_that_the_next_does_not_clear(home: Home) -> None:
    started = local.start(home.folder, Silent())
    background = psutil.Process(started.pid)
    parts = background.children(recursive=True)
    background.kill()
    background.wait()
    assert local.running(home.folder) is None
    again = local.start(home.folder, Silent())
    assert again.pid != background.pid
    local.end(again)
    _, alive = psutil.wait_procs(parts, timeout=60)
    assert alive == []
    assert not Path(started.session).exists()
