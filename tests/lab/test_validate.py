"""validate.yml and status.yml: a cluster that works, and one in which several things do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.cluster import Cluster, Run

pytestmark = pytest.mark.lab


def _validate(cluster: Cluster, report: Path, *arguments: str, ok: bool) -> tuple[Run, list[dict[str, str]]]:
    run = cluster.play("validate.yml", "-e", f"validate_report={report}", *arguments, ok=ok)
    told: dict[str, Any] = json.loads(report.read_text())
    assert told["ok"] is ok
    assert run.code == (0 if ok else 1)
    return run, told["findings"]


def test_a_cluster_that_works_passes_and_nothing_is_left_behind(cluster: Cluster, tmp_path: Path) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    run, findings = _validate(cluster, tmp_path / "report.json", ok=True)
    names = {host.name for host in cluster.nodes}
    for check in (
        "host_base",
        "firewall",
        "nfs_client",
        "python_runtime",
        "ray_node",
        "outside",
        "node",
        "task",
        "versions",
        "storage",
    ):
        assert {one["host"] for one in findings if one["check"] == check} == names, check
    assert {one["result"] for one in findings} == {"passed"}
    assert {one["check"] for one in findings} >= {"train", "serve"}
    assert run.changed == 0
    assert "passed  storage" in run.output
    assert cluster.head.ssh("find /srv/llm-ray/runs -name '.validate*'").stdout == ""
    code = (
        "import ray\nray.init(log_to_driver=False, logging_level='error')\nfrom ray.util.state import list_actors\n"
        "print('ALIVE', [a.class_name for a in list_actors(filters=[('state', '=', 'ALIVE')])])"
    )
    # The one that every run of Ray Train leaves, of Ray's own, idle and without resources.
    assert "ALIVE ['_AutoscalingCoordinatorActor']" in cluster.ray(code)


@pytest.mark.long
def test_each_failure_names_the_host_and_what_to_do(cluster: Cluster, tmp_path: Path) -> None:
    worker1, worker2 = cluster.workers
    redirect = "nft add table ip lie; nft add chain ip lie out '{ type nat hook output priority -100; }'"
    redirect += "; nft add rule ip lie out tcp dport 52365 redirect to :9999"
    try:
        worker1.ssh("nft delete table inet llm_ray")  # its ports are open to this machine
        worker1.ssh(
            f"systemd-run --unit=lie --quiet python3 -m http.server 9999; {redirect}"
        )  # an agent that wants no token
        worker2.ssh("systemctl stop llm-ray-worker")
        _, findings = _validate(
            cluster,
            tmp_path / "report.json",
            "--skip-tags",
            "train,serve",
            "-i",
            str(_ghost(cluster, tmp_path)),
            ok=False,
        )
    finally:
        worker1.ssh("systemctl stop lie; nft delete table ip lie; systemctl restart llm-ray-firewall", check=False)
        worker2.ssh("systemctl start llm-ray-worker")
    failed = {(one["host"], one["check"]): one for one in findings if one["result"] == "failed"}
    assert set(failed) == {
        ("worker1", "firewall"), ("worker1", "outside"), ("worker1", "ray_node"), ("worker2", "ray_node"), ("worker2", "node"),
        ("ghost", "reached"), ("ghost", "node"),
    }  # fmt: skip
    assert f"{worker1.address}:6380" in failed["worker1", "outside"]["found"]
    assert "without a token" in failed["worker1", "ray_node"]["found"]
    assert "llm-ray-worker is inactive" in failed["worker2", "ray_node"]["found"]
    assert all(one["fix"] for one in failed.values())
    cluster.wait_for_nodes(cluster.nodes)


@pytest.mark.long
def test_status_shows_the_cluster_and_says_when_its_head_is_down(cluster: Cluster, tmp_path: Path) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    up = cluster.play("status.yml")
    assert all(f"{host.name} {host.address}" in " ".join(up.output.split()) for host in cluster.nodes)
    assert "no jobs" in up.output
    try:
        cluster.head.ssh("systemctl stop llm-ray-head")
        down = cluster.play("status.yml", "-i", str(_ghost(cluster, tmp_path)))
    finally:
        cluster.head.ssh("systemctl start llm-ray-head")
    assert "head is down" in " ".join(down.output.split())  # YAML doubles the apostrophe before it
    assert "the host is not reached" in down.output
    cluster.wait_for_nodes(cluster.nodes)


def _ghost(cluster: Cluster, folder: Path) -> Path:
    """An inventory with a worker at whose address nobody is."""
    file = folder / "ghost.yml"
    file.write_text(f"ray_workers: {{hosts: {{ghost: {{ansible_host: {cluster.lab.net.prefix}.250}}}}}}\n")
    return file
