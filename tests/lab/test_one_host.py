"""A cluster of one host, whose node runs in Docker: the smallest there is, and the other runtime in the short set of
the lab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_ray.serve.gateway.protect.keys import new_secret
from tests.lab import cluster as lab_cluster
from tests.lab import docker
from tests.lab.cluster import Cluster, Run
from tests.lab.wheels import ROOT
from tests.lab.workflows import Workflow
from tests.waiting import until

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def alone(lab_ready: None) -> Iterator[Cluster]:
    """A bare host in which Docker can run, with storage of its own: neither an NFS server nor a mount."""
    with lab_cluster.cluster(
        {"ray_head": ["solo"], "ray_workers": []}, **docker.VARIABLES | {"llm_ray_storage": "nfs"}
    ) as made:
        docker.prepare(made.head)
        yield made
    docker.clear_cgroups()


@pytest.fixture(scope="module")
def first(alone: Cluster) -> Run:
    """site.yml on it."""
    docker.import_base(alone)
    return alone.play("site.yml", timeout=3000)


def test_this_machine_may_be_it_and_is_not_touched_by_check_mode(lab_ready: None, tmp_path: Path) -> None:
    """The default inventory, of this machine alone; what preflight thinks of it is not the question."""
    places = [
        Path(name)
        for name in ("/etc/llm-ray", "/opt/llm-ray", "/var/lib/llm-ray", "/srv/llm-ray", "/etc/profile.d/llm-ray.sh")
    ]
    before = [place.exists() for place in places]
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "site.yml",
        "--check",
        "--diff",
        "--skip-tags",
        "preflight",
    ]
    environment = os.environ | {"HOME": str(tmp_path), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    assert Cluster.parse(done.stdout)["localhost"]["failed"] == 0
    assert [place.exists() for place in places] == before


def test_check_mode_leaves_the_bare_host_bare(alone: Cluster) -> None:
    checked = alone.play("site.yml", "--check", "--diff", "-e", "monitoring_enabled=true")
    assert "ExecStartPre=/usr/bin/docker run --detach --name llm-ray-head" in checked.output
    assert (
        alone.head.ssh("command -v dockerd prometheus; ls -d /etc/llm-ray /opt/llm-ray /etc/docker", check=False).stdout
        == ""
    )


def test_its_node_runs_in_docker_as_nobody_in_particular(alone: Cluster, first: Run) -> None:
    alone.wait_for_nodes([alone.head])
    (node,) = json.loads(alone.head.ssh("docker inspect llm-ray-head").stdout)
    assert node["HostConfig"]["ReadonlyRootfs"]
    assert node["HostConfig"]["CapDrop"] == ["ALL"]
    assert node["Config"]["User"] == "1200:1200"
    listed = json.loads(alone.head.ssh("docker exec llm-ray-head cat /opt/llm-ray/packages.cdx.json").stdout)
    assert {"ray", "torch", "llm-ray", "libc6"} <= {part["name"] for part in listed["components"]}


def test_a_second_run_changes_nothing_and_is_fast(alone: Cluster, first: Run) -> None:
    before = alone.head.ssh("docker inspect --format '{{.Id}}' llm-ray-head").stdout
    second = alone.play("site.yml")
    print(
        f"docker, one host: first run {first.seconds:.0f} s, second {second.seconds:.0f} s, "
        f"1/{first.seconds / second.seconds:.1f}"
    )
    assert second.changes() == []
    assert second.changed == 0
    assert alone.head.ssh("docker inspect --format '{{.Id}}' llm-ray-head").stdout == before
    assert second.seconds < first.seconds / 4, f"{second.seconds:.0f} s after {first.seconds:.0f} s"


def test_validate_finds_nothing(alone: Cluster, first: Run, tmp_path: Path) -> None:
    alone.play("validate.yml", "-e", f"validate_report={tmp_path / 'report.json'}")
    told: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert told["ok"]
    assert {one["check"] for one in told["findings"]} >= {
        "docker_engine",
        "ray_node",
        "outside",
        "node",
        "task",
        "storage",
        "train",
        "serve",
    }
    assert {one["result"] for one in told["findings"]} == {"passed"}


def test_a_model_is_finetuned_served_and_taken_away(alone: Cluster, first: Run, smollm2: Path, tmp_path: Path) -> None:
    """The workflows of test_workflows.py in short."""
    work = Workflow(alone, tmp_path, smollm2)
    tuned = alone.play("finetune.yml", *work.finetune("codes"), timeout=1200)
    assert "codes is done: /srv/llm-ray/runs/codes" in tuned.output
    assert work.told("codes")["state"] == "done"
    served = alone.play("serve.yml", *work.serve("codes"), timeout=1200)
    assert "was asked: What is the capital of France?" in " ".join(served.output.split())
    assert work.key not in served.output
    assert (work.ask("codes"), work.ask("codes", new_secret())) == (200, 401)
    alone.play("serve_stop.yml", "-e", "model=codes")
    until(lambda: work.ask("codes") == 404, "the gateway knows that it is gone")


def test_reset_leaves_the_host_as_it_was(alone: Cluster, first: Run) -> None:
    alone.play("reset.yml", "-e", "confirm=llm-ray")
    left = "ls -d /etc/llm-ray /opt/llm-ray /var/lib/llm-ray /etc/systemd/system/llm-ray-* /usr/local/bin/llm-ray; command -v dockerd"
    assert alone.head.ssh(left, check=False).stdout == ""
