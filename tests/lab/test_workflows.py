"""finetune.yml, serve.yml and serve_stop.yml on three hosts: one job for one run, whoever asks; hosts that are lost; an
endpoint that comes back."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm_ray.serve.gateway.protect.keys import new_secret
from tests.lab.cluster import Cluster, Run
from tests.lab.workflows import Workflow, llm_ray
from tests.waiting import until

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module", params=["bare_metal", pytest.param("docker", marks=pytest.mark.long)])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """The hosts after site.yml, in either runtime. A test that breaks the cluster leaves it whole again."""
    made: Cluster = (
        request.getfixturevalue("in_docker").cluster
        if request.param == "docker"
        else request.getfixturevalue("in_venv")
    )
    made.wait_for_nodes(made.nodes)
    return made


@pytest.fixture(scope="module")
def work(cluster: Cluster, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    return Workflow(cluster, tmp_path_factory.mktemp("workflow"), smollm2)


def _words(run: Run) -> str:
    return " ".join(run.output.split())


def _end(process: subprocess.Popen[str], timeout: float = 900) -> str:
    output, _ = process.communicate(timeout=timeout)
    return output


# A finetune -----------------------------------------------------------------------------------------------------------


def test_a_conf_is_only_rendered_and_validated_in_check_mode(cluster: Cluster, work: Workflow) -> None:
    run = cluster.play("finetune.yml", *work.finetune("looked-at"), "--check")
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
            "traning.epochs is neither a key of the conf nor a variable of codes.yaml.j2; did you mean "
            "training.epochs?",
        ),
        ({"conf": "codez"}, "-e conf=codez: no such file"),
        ({"train": "/nowhere/rows.jsonl"}, "data.train: no such file or folder: /nowhere/rows.jsonl"),
        (
            {"runtime.hosts": "ray_wrokers"},
            "the inventory has no Ray node or group ray_wrokers; did you mean ray_workers?",
        ),
        ({"wait": "maybe"}, "wait = maybe: use -e wait=true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_told_before_anything_starts(
    cluster: Cluster, work: Workflow, settings: dict[str, Any], words: str
) -> None:
    run = cluster.play("finetune.yml", *work.finetune("wrong", **settings), ok=False)
    assert run.code != 0
    assert words.replace("'", "''") in _words(run).replace("'", "''").replace("''''", "''"), run.output
    assert "Traceback" not in run.output
    assert cluster.head.ssh("ls /srv/llm-ray/runs/wrong", check=False).returncode != 0


def test_a_conf_for_nodes_of_the_other_runtime_is_refused(cluster: Cluster, work: Workflow) -> None:
    here = "docker" if cluster.variables.get("llm_ray_runtime") == "docker" else "bare_metal"
    other = "docker" if here == "bare_metal" else "bare_metal"
    run = cluster.play("finetune.yml", *work.finetune("wrong", **{"runtime.nodes": other}), ok=False)
    assert run.code != 0
    assert f"runtime.nodes is {other}, but the cluster''s nodes run as {here}" in _words(run)


@pytest.fixture(scope="module")
def made(cluster: Cluster, work: Workflow) -> Run:
    """A finetune on both workers, from files of this machine."""
    return cluster.play("finetune.yml", *work.finetune("codes"), timeout=1200)


def test_a_finetune_runs_on_both_hosts_and_shows_its_progress(cluster: Cluster, made: Run, work: Workflow) -> None:
    assert "finetune-codes-1: submitted" in made.output
    assert re.search(r"^ +training 4/4 loss", made.output, re.M), made.output[-6000:]
    assert "codes is done: /srv/llm-ray/runs/codes" in made.output
    told = work.told("codes")
    assert told["state"] == "done"
    assert (
        cluster.head.ssh("cd /srv/llm-ray/runs/codes/submitted && sha256sum --check *.sha256")
        .stdout.strip()
        .endswith(": OK")
    )
    assert "model.safetensors" in cluster.head.ssh("ls /srv/llm-ray/runs/codes/output").stdout
    assert cluster.head.ssh("stat -c %U /srv/llm-ray/runs/codes /srv/llm-ray/data/uploads").stdout.split() == [
        "ray",
        "ray",
    ]
    assert cluster.head.ssh("ls -A /var/lib/llm-ray/upload").stdout == ""


def test_a_second_run_copies_nothing_and_does_nothing_again(cluster: Cluster, work: Workflow, made: Run) -> None:
    again = cluster.play("finetune.yml", *work.finetune("codes"))
    assert again.changes() == ["ray_job : Submit the job or attach to the same one: [head]"]
    assert "train: already done with the same inputs, skipped" in again.output


@pytest.mark.long
def test_two_terminals_see_one_job_and_a_third_stops_it_resumably(cluster: Cluster, work: Workflow) -> None:
    long = work.finetune("long", **{"training.max_steps": 400})
    first = cluster.start("finetune.yml", *long)
    second = cluster.start("finetune.yml", *long)
    try:
        until(lambda: work.steps("long") >= 3, "the run trains")
        other = cluster.play("finetune.yml", *work.finetune("long", **{"training.max_steps": 300}), ok=False)
        assert "runs with another conf (- max_steps: 400; + max_steps: 300)" in _words(other)
        forced = cluster.play("finetune.yml", *long, "-e", "force=true", ok=False)
        assert "finetune-long-1 runs, and was not started with --force" in _words(forced)
        assert "finetune-long-1" in cluster.play("status.yml").output
        cancelled = cluster.play("finetune.yml", "-e", "name=long", "-e", "cancel=true")  # no conf, nor its files
        assert "finetune-long-1 is stopped" in cancelled.output
        outputs = [_end(first), _end(second)]
    finally:
        first.kill()
        second.kill()
    assert sorted("finetune-long-1: runs already" in said for said in outputs) == [False, True]
    assert all("was stopped with a checkpoint" in " ".join(said.split()) for said in outputs)
    steps = work.steps("long")
    assert work.told("long")["state"] == "stopped"
    assert "no job of long runs" in cluster.play("finetune.yml", *long, "-e", "cancel=true").output
    submitted = cluster.play("finetune.yml", *long, "-e", "wait=false")
    assert submitted.seconds < 120
    assert "finetune-long-2" in llm_ray(cluster, "status", "--address", "auto")
    until(lambda: work.steps("long") > steps, "the run goes on where it was")
    cluster.play("finetune.yml", *long, "-e", "cancel=true")


@pytest.mark.long
def test_a_run_begins_at_a_checkpoint_that_is_named(cluster: Cluster, work: Workflow, made: Run) -> None:
    wrong = cluster.play(
        "finetune.yml", *work.finetune("later", resume="/srv/llm-ray/runs/codes/checkpoint/step_00000009"), ok=False
    )
    assert "step_00000009" in _words(wrong)
    assert "Traceback" not in wrong.output
    cluster.play(
        "finetune.yml", *work.finetune("later", resume="/srv/llm-ray/runs/codes/checkpoint/step_00000002"), timeout=1200
    )
    assert work.losses("later") == pytest.approx(
        {step: loss for step, loss in work.losses("codes").items() if step > 2}, abs=1e-4
    )
    repeated = work.finetune("later", force=True, resume="no", stages=["train"])
    cluster.play("finetune.yml", *repeated, timeout=1200)
    assert work.losses("later") == pytest.approx(work.losses("codes"), abs=1e-4)


@pytest.mark.long
def test_with_a_host_lost_in_mid_training_the_run_ends_on_what_is_left(cluster: Cluster, work: Workflow) -> None:
    lost = cluster.workers[1]
    run = cluster.start(
        "finetune.yml", *work.finetune("lossy", **{"training.max_steps": 40, "stages": ["prepare", "train", "export"]})
    )
    try:
        until(lambda: work.steps("lossy") >= 4, "the run trains")
        lost.cut()
        output = _end(run, 1200)
    finally:
        lost.plug()
        run.kill()
    assert run.returncode == 0, output[-6000:]
    assert re.search(r"1 worker\(s\) continue from the checkpoint of step \d+", output), output[-6000:]
    assert work.told("lossy")["state"] == "done"
    lost.ssh("systemctl restart llm-ray-worker")
    cluster.wait_for_nodes(cluster.nodes)


def test_two_runs_that_bring_the_same_new_file_do_not_take_it_from_each_other(cluster: Cluster, work: Workflow) -> None:
    rows = work.folder / "more.jsonl"
    rows.write_text((work.folder / "rows.jsonl").read_text() * 4000)
    settings = {"train": str(rows), "data.max_rows": 24, "stages": ["prepare"]}
    runs = [cluster.start("finetune.yml", *work.finetune(name, **settings)) for name in ("one", "other")]
    try:
        outputs = [_end(run) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "".join(output[-6000:] for output in outputs)
    uploads = cluster.head.ssh("ls -A /srv/llm-ray/data/uploads/*/ | grep more; ls -A /var/lib/llm-ray/upload").stdout
    assert uploads.split() == [".more.jsonl.sha256", "more.jsonl"]


# An endpoint ----------------------------------------------------------------------------------------------------------


def test_an_endpoint_is_not_opened_where_the_firewall_does_not_guard_it(cluster: Cluster, work: Workflow) -> None:
    run = cluster.play("serve.yml", *work.serve("codes", port=9100), "--check", ok=False)
    assert run.code != 0
    assert "endpoint.port is 9100, none of the ports that the firewall guards (8000, 7860)" in _words(run)


@pytest.mark.long
def test_a_finetune_goes_on_to_serve_what_it_made(cluster: Cluster, made: Run, work: Workflow) -> None:
    deployed = work.finetune("codes", deploy=True, serve_conf="small", question="What is code 3?")
    run = cluster.play("finetune.yml", *deployed, *work.keys(), timeout=1200)
    assert re.search(r"codes at http://\S+/v1 was asked: What is code 3\?", _words(run)), run.output[-4000:]
    assert work.key not in run.output
    assert work.ask("codes") == 200
    cluster.play("serve_stop.yml", "-e", "model=codes")
    until(lambda: work.ask("codes") == 404, "the model is gone")


@pytest.fixture(scope="module")
def served(cluster: Cluster, made: Run, work: Workflow) -> Run:
    """The finetuned model behind the endpoint, and a key from a vault. All cores of a host for each replica: they are
    on two hosts."""
    return cluster.play("serve.yml", *work.serve("codes", **{"models.codes.cpus": 2}), timeout=1200)


def test_a_finetuned_model_is_served_and_asked(cluster: Cluster, served: Run, work: Workflow) -> None:
    assert re.search(r"codes at http://\S+/v1 was asked: What is the capital of France\?", _words(served)), (
        served.output[-4000:]
    )
    assert work.key not in served.output
    assert work.ask("codes") == 200
    assert work.ask("codes", new_secret()) == 401
    kept = cluster.head.ssh("cat /srv/llm-ray/serve/keys.json; stat -c %a /srv/llm-ray/serve/keys.json").stdout
    assert work.key not in kept
    assert kept.split()[-1] == "600"
    assert '"alice"' in kept
    assert kept.count('"sha256"') == 1  # the one that serve.yml asked with is gone
    assert "model:codes" in cluster.play("status.yml").output


@pytest.mark.long
def test_after_a_reboot_of_the_head_the_endpoint_comes_back_by_itself(
    cluster: Cluster, served: Run, work: Workflow
) -> None:
    cluster.head.reboot()
    until(lambda: work.ask("codes") == 200, "the model answers again", 600)
    cluster.wait_for_nodes(cluster.nodes)


@pytest.mark.long
def test_a_host_lost_while_clients_ask_leaves_the_endpoint_answering(
    cluster: Cluster, served: Run, work: Workflow
) -> None:
    until(lambda: work.ask("codes") == 200, "the model answers")
    lost = next(
        worker for worker in cluster.workers if worker.ssh("pgrep -f '[S]erveReplica:model:codes'", check=False).stdout
    )
    lost.cut()
    try:
        until(lambda: all(work.ask("codes") == 200 for _ in range(4)), "the other replica answers", 300)
    finally:
        lost.plug()
    lost.ssh("systemctl restart llm-ray-worker")
    cluster.wait_for_nodes(cluster.nodes)


@pytest.mark.long
def test_a_worker_that_holds_a_replica_leaves_and_comes_back_while_clients_ask(
    cluster: Cluster, served: Run, work: Workflow
) -> None:
    until(lambda: work.ask("codes") == 200, "the model answers")
    leaving = next(
        worker for worker in cluster.workers if worker.ssh("pgrep -f '[S]erveReplica:model:codes'", check=False).stdout
    )
    for playbook in ("remove_node.yml", "add_node.yml"):
        run = cluster.start(playbook, "-e", f"node={leaving.name}")
        answers = []
        try:
            while run.poll() is None:
                answers.append(work.ask("codes"))
            output = _end(run)
        finally:
            run.kill()
        assert run.returncode == 0, output[-6000:]
        assert {*answers} == {200}, answers
    cluster.wait_for_nodes(cluster.nodes)


def test_a_model_is_taken_away_and_does_not_come_back(cluster: Cluster, served: Run) -> None:
    wrong = cluster.play("serve_stop.yml", "-e", "model=codez", ok=False)
    assert wrong.code != 0
    assert "no model codez is served here; served are: codes" in _words(wrong)
    assert cluster.play("serve_stop.yml", ok=False).code != 0
    cluster.play("serve_stop.yml", "-e", "all=true")
    assert "no applications" in cluster.play("status.yml").output
    assert json.loads(cluster.head.ssh("cat /srv/llm-ray/serve/desired.json").stdout)["models"] == {}
