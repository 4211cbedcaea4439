"""finetune.yml, serve.yml and serve_stop.yml on three hosts: one job for one run, whoever asks; hosts that are lost; an endpoint that comes back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_ray.serve.protect.keys import new_secret
from tests.lab.cluster import Cluster, Run

pytestmark = pytest.mark.lab

_FACTS = ["belt", "seal", "valve", "fan"]


@pytest.fixture(scope="module")
def conf(cluster: Cluster, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Arguments for finetune.yml: a conf of two workers on the real small model, both of this machine and copied to the shared storage."""
    cluster.wait_for_nodes(cluster.nodes)
    folder = tmp_path_factory.mktemp("conf")
    rows = [{"prompt": f"What is code {n}?", "completion": f"Code {n} means the {_FACTS[n % 4]} is worn."} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = (cluster.bundle / "conf/finetune/cluster.yaml.j2").read_text()
    own = template.replace("  # upload: true", "  upload: true")
    (cluster.bundle / "conf/finetune/codes.yaml.j2").write_text(own)

    def arguments(name: str, **settings: Any) -> list[str]:
        given = {
            "conf": "codes",
            "name": name,
            "model": str(smollm2),
            "train": str(folder / "rows.jsonl"),
            "data.max_length": 64,
            "data.validation": None,
            "training.epochs": None,
            "training.max_steps": 4,
            "training.batch_size": 1,
            "training.gradient_accumulation": 1,
            "tuning.lora.r": 4,
            "checkpoint.every_steps": 2,
            "evaluation.samples": 2,
            "evaluation.max_new_tokens": 8,
        } | settings
        return ["-e", json.dumps(given)]

    return arguments


def _run_json(cluster: Cluster, name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(cluster.head.ssh(f"cat /srv/llm-ray/runs/{name}/run.json").stdout)
    return told


def _words(run: Run) -> str:
    return " ".join(run.output.split())


def _until(condition: Callable[[], bool], what: str, timeout: float = 300) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.5)


def _steps(cluster: Cluster, name: str) -> int:
    """Steps that the run has noted."""
    said = cluster.head.ssh(f"grep -c '\"loss\"' /srv/llm-ray/runs/{name}/metrics.jsonl", check=False).stdout
    return int(said or 0)


def _end(process: subprocess.Popen[str], timeout: float = 900) -> str:
    output, _ = process.communicate(timeout=timeout)
    return output


# A finetune ----------------------------------------------------------------------------------------------------------------


def test_a_conf_is_only_rendered_and_validated_in_check_mode(cluster: Cluster, conf: Callable[..., list[str]]) -> None:
    run = cluster.play("finetune.yml", *conf("looked-at"), "--check")
    assert run.changed == 0
    assert "name: looked-at" in run.output
    assert all(worker.address in run.output for worker in cluster.workers)  # the group ray_workers, as addresses
    assert "workers: 2" in run.output
    assert cluster.head.ssh("ls /srv/llm-ray/runs/looked-at", check=False).returncode != 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"traning.epochs": 2},
            "traning.epochs is neither a key of the conf nor a variable of codes.yaml.j2; did you mean training.epochs?",
        ),
        ({"conf": "codez"}, "-e conf=codez: no such file"),
        ({"train": "/nowhere/rows.jsonl"}, "data.train: no such file or folder: /nowhere/rows.jsonl"),
        ({"runtime.hosts": "ray_wrokers"}, "the inventory has no Ray node or group ray_wrokers; did you mean ray_workers?"),
        ({"runtime.nodes": "docker"}, "runtime.nodes is docker, and the cluster's nodes run as bare_metal"),
        ({"wait": "maybe"}, "wait = maybe: type -e wait=true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_told_before_anything_starts(
    cluster: Cluster, conf: Callable[..., list[str]], settings: dict[str, Any], words: str
) -> None:
    run = cluster.play("finetune.yml", *conf("wrong", **settings), ok=False)
    assert run.code != 0
    assert words.replace("'", "''") in _words(run).replace("'", "''").replace("''''", "''"), run.output
    assert "Traceback" not in run.output
    assert cluster.head.ssh("ls /srv/llm-ray/runs/wrong", check=False).returncode != 0


@pytest.fixture(scope="module")
def made(cluster: Cluster, conf: Callable[..., list[str]]) -> Run:
    """A finetune on both workers, from files of this machine."""
    return cluster.play("finetune.yml", *conf("codes"), timeout=1200)


def test_a_finetune_runs_on_both_hosts_and_shows_its_progress(cluster: Cluster, made: Run) -> None:
    assert "finetune-codes-1: submitted" in made.output
    assert re.search(r"^ +training 4/4 loss", made.output, re.M), made.output[-6000:]
    assert "codes is done: /srv/llm-ray/runs/codes" in made.output
    told = _run_json(cluster, "codes")
    assert told["state"] == "done"
    assert cluster.head.ssh("cd /srv/llm-ray/runs/codes/submitted && sha256sum --check *.sha256").stdout.strip().endswith(": OK")
    assert "model.safetensors" in cluster.head.ssh("ls /srv/llm-ray/runs/codes/output").stdout
    assert cluster.head.ssh("stat -c %U /srv/llm-ray/runs/codes /srv/llm-ray/data/uploads").stdout.split() == ["ray", "ray"]
    assert cluster.head.ssh("ls /var/lib/llm-ray/upload", check=False).returncode != 0


def test_a_second_run_copies_nothing_and_does_nothing_again(cluster: Cluster, conf: Callable[..., list[str]], made: Run) -> None:
    again = cluster.play("finetune.yml", *conf("codes"))
    assert again.changes() == ["ray_job : Submit it, or attach to the job that does the same: [head]"]
    assert "train: done before with the same inputs, skipped" in again.output


def test_two_terminals_see_one_job_and_a_third_stops_it_resumably(cluster: Cluster, conf: Callable[..., list[str]]) -> None:
    long = conf("long", **{"training.max_steps": 400})
    first = cluster.start("finetune.yml", *long)
    second = cluster.start("finetune.yml", *long)
    try:
        _until(lambda: _steps(cluster, "long") >= 3, "the run trains")
        other = cluster.play("finetune.yml", *conf("long", **{"training.max_steps": 300}), ok=False)
        assert "runs with another conf (- max_steps: 400; + max_steps: 300)" in _words(other)
        assert "finetune-long-1" in cluster.play("status.yml").output
        cancelled = cluster.play("finetune.yml", *long, "-e", "cancel=true")
        assert "finetune-long-1 is stopped" in cancelled.output
        outputs = [_end(first), _end(second)]
    finally:
        first.kill()
        second.kill()
    assert sorted("attach" in said or "runs already" in said for said in outputs) == [False, True]
    assert all("was stopped, with a checkpoint to go on from" in " ".join(said.split()) for said in outputs)
    steps = _steps(cluster, "long")
    assert _run_json(cluster, "long")["state"] == "stopped"
    assert "no job of long runs" in cluster.play("finetune.yml", *long, "-e", "cancel=true").output
    submitted = cluster.play("finetune.yml", *long, "-e", "wait=false")
    assert submitted.seconds < 120
    _until(lambda: _steps(cluster, "long") > steps, "the run goes on where it was")
    cluster.play("finetune.yml", *long, "-e", "cancel=true")


@pytest.mark.long
def test_with_a_host_lost_in_mid_training_the_run_ends_on_what_is_left(cluster: Cluster, conf: Callable[..., list[str]]) -> None:
    lost = cluster.workers[1]
    run = cluster.start("finetune.yml", *conf("lossy", **{"training.max_steps": 40, "stages": ["prepare", "train", "export"]}))
    try:
        _until(lambda: _steps(cluster, "lossy") >= 4, "the run trains")
        lost.cut()
        output = _end(run, 1200)
    finally:
        lost.plug()
        run.kill()
    assert run.returncode == 0, output[-6000:]
    assert re.search(r"1 worker\(s\) go on from the checkpoint of step \d+", output), output[-6000:]
    assert _run_json(cluster, "lossy")["state"] == "done"
    lost.ssh("systemctl restart llm-ray-worker")
    cluster.wait_for_nodes(cluster.nodes)


# An endpoint ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key() -> str:
    return new_secret()


@pytest.fixture(scope="module")
def served(cluster: Cluster, made: Run, key: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The finetuned model behind the endpoint, with a replica on each worker, and a key from a vault."""
    folder = tmp_path_factory.mktemp("vault")
    (folder / "password").write_text("a password")
    (folder / "keys.yml").write_text(json.dumps({"llm_ray_api_keys": {"alice": key}, "llm_ray_serve_host": "0.0.0.0"}))  # noqa: S104
    vault = ["--vault-password-file", str(folder / "password")]
    subprocess.run([Path(sys.executable).parent / "ansible-vault", "encrypt", *vault, folder / "keys.yml"], check=True, capture_output=True)
    # All cores of a host for each replica: they are on two hosts.
    settings = {"model": "codes", "engine": "transformers", "models.codes.cpus": 2, "models.codes.max_model_len": 256}
    return cluster.play("serve.yml", "-e", f"@{folder / 'keys.yml'}", *vault, "-e", json.dumps(settings), timeout=1200)


_CLIENT = """
import json, urllib.error, urllib.request
body = {"model": "codes", "messages": [{"role": "user", "content": "What is code 3?"}], "max_tokens": 8, "temperature": 0}
request = urllib.request.Request("http://ADDRESS:8000/v1/chat/completions", data=json.dumps(body).encode())
request.add_header("Authorization", "Bearer KEY")
request.add_header("Content-Type", "application/json")
try:
    print(urllib.request.urlopen(request, timeout=60).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print(0)
"""


def _ask(cluster: Cluster, key: str) -> int:
    """The status that a client among the hosts, whom the firewall lets in, gets for a question; 0 for no answer."""
    code = _CLIENT.replace("ADDRESS", cluster.head.address).replace("KEY", key)
    return int(cluster.head.ssh(f"python3 - <<'END'\n{code}\nEND", check=False).stdout or 0)


def test_a_finetuned_model_is_served_and_asked(cluster: Cluster, served: Run, key: str) -> None:
    assert re.search(r"codes at http://\S+/v1 was asked: What is the capital of France\?", _words(served)), served.output[-4000:]
    assert key not in served.output
    assert _ask(cluster, key) == 200
    assert _ask(cluster, new_secret()) == 401
    kept = cluster.head.ssh("cat /srv/llm-ray/serve/keys.json; stat -c %a /srv/llm-ray/serve/keys.json").stdout
    assert key not in kept
    assert kept.split()[-1] == "600"
    assert '"alice"' in kept
    assert kept.count('"sha256"') == 1  # the one that serve.yml asked with is gone
    assert "model:codes" in cluster.play("status.yml").output


@pytest.mark.long
def test_after_a_reboot_of_the_head_the_endpoint_comes_back_by_itself(cluster: Cluster, served: Run, key: str) -> None:
    cluster.head.reboot()
    _until(lambda: _ask(cluster, key) == 200, "the model answers again", 600)
    cluster.wait_for_nodes(cluster.nodes)


@pytest.mark.long
def test_a_host_lost_while_clients_ask_leaves_the_endpoint_answering(cluster: Cluster, served: Run, key: str) -> None:
    _until(lambda: _ask(cluster, key) == 200, "the model answers")
    lost = next(worker for worker in cluster.workers if worker.ssh("pgrep -f '[S]erveReplica:model:codes'", check=False).stdout)
    lost.cut()
    try:
        _until(lambda: all(_ask(cluster, key) == 200 for _ in range(4)), "the other replica answers", 300)
    finally:
        lost.plug()
    lost.ssh("systemctl restart llm-ray-worker")
    cluster.wait_for_nodes(cluster.nodes)


def test_a_model_is_taken_away_and_does_not_come_back(cluster: Cluster, served: Run) -> None:
    wrong = cluster.play("serve_stop.yml", "-e", "model=codez", ok=False)
    assert wrong.code != 0
    assert "no model codez is served here; there are: codes" in _words(wrong)
    assert cluster.play("serve_stop.yml", ok=False).code != 0
    cluster.play("serve_stop.yml", "-e", "all=true")
    assert "no applications" in cluster.play("status.yml").output
    assert json.loads(cluster.head.ssh("cat /srv/llm-ray/serve/declared.json").stdout)["models"] == {}
