"""add_node.yml and remove_node.yml: one worker comes and goes, and the others notice nothing but the list of who
belongs."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.lab.cluster import Cluster
from tests.waiting import until

pytestmark = [pytest.mark.lab, pytest.mark.long]

_LISTS = ("host_base : Write /etc/hosts", "firewall : ")
# Where the bundle's parts lie on a host.
_PARTS = "ls -d /etc/llm-ray /opt/llm-ray /var/lib/llm-ray /etc/systemd/system/llm-ray-* /run/systemd/system/llm-ray-* /usr/local/bin/llm-ray"


def _pids(cluster: Cluster) -> dict[str, str]:
    """The process of Ray's unit on each host."""
    return {
        host.name: host.ssh("systemctl show --value -p MainPID 'llm-ray-head' 'llm-ray-worker'").stdout
        for host in cluster.nodes
    }


@pytest.mark.parametrize("node", ["all", "head", "worker1,worker2", "wroker2"])
def test_only_one_worker_may_be_named(cluster: Cluster, node: str) -> None:
    run = cluster.play("remove_node.yml", "-e", f"node={node}", ok=False)
    assert run.code != 0
    assert f"node = {node}" in run.output
    assert run.changed == 0
    assert "PLAY [Drain the node]" not in run.output


def test_no_worker_is_removed_behind_the_heads_back(cluster: Cluster) -> None:
    run = cluster.play("remove_node.yml", "-e", "node=worker2", "--limit", "worker2", ok=False)
    assert run.code != 0
    assert "run this without --limit" in run.output
    assert run.changed == 0


def test_a_worker_stays_when_the_head_is_not_reached(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    cluster.head.cut()
    try:
        run = cluster.play("remove_node.yml", "-e", "node=worker2", ok=False)
    finally:
        cluster.head.plug()
    assert run.code != 0
    assert "head is unreachable, but it must drain the node: nothing was changed" in " ".join(
        run.output.replace("''", "'").split()
    )
    assert run.changed == 0
    leaving = cluster.hosts["worker2"]
    assert leaving.ssh("systemctl show --value -p Restart llm-ray-worker").stdout.strip() == "always"
    cluster.wait_for_nodes(cluster.nodes)


def test_one_host_alone_is_all_right_when_nothing_is_cached_of_the_others(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    shutil.rmtree(cluster.lab.folder / "home/.cache/llm-ray/facts")
    run = cluster.play("site.yml", "--limit", "worker1")
    assert run.changes() == []
    shutil.rmtree(cluster.lab.folder / "home/.cache/llm-ray/facts")
    cluster.head.cut()
    try:
        away = cluster.play("site.yml", "--limit", "worker1", "--skip-tags", "preflight", ok=False)
    finally:
        cluster.head.plug()
    assert away.code != 0
    assert "head: left out by --limit, unreachable now" in " ".join(away.output.split())
    assert away.changed == 0
    cluster.wait_for_nodes(cluster.nodes)


def test_a_node_that_does_not_start_says_why_and_soon(cluster: Cluster) -> None:
    wrong = ["-e", "ray_node_cpus=many", "--skip-tags", "preflight"]  # which would refuse it
    run = cluster.play("site.yml", "--tags", "ray_node", "--limit", "worker1", *wrong, ok=False)
    assert run.code != 0
    assert re.search(
        r"worker1: after \d+ s llm-ray-worker is \w+ and was restarted \d+ times; its journal ends:", run.output
    )
    assert "'many' is not a valid int" in run.output
    assert run.seconds < 280
    cluster.play("site.yml")
    cluster.wait_for_nodes(cluster.nodes)


def test_a_removal_that_is_cut_off_is_undone_by_site(cluster: Cluster) -> None:
    """It dies when it has the head drain the node, which then would not come back by itself."""
    cluster.wait_for_nodes(cluster.nodes)
    leaving, drop_in = cluster.hosts["worker2"], "/run/systemd/system/llm-ray-worker.service.d"
    cluster.cut_off("remove_node.yml", "-e", "node=worker2", at="Query the cluster: drain")
    restart = "systemctl show --value -p Restart llm-ray-worker"
    assert leaving.ssh(f"ls {drop_in}; {restart}").stdout.split() == ["drain.conf", "no"]
    cluster.play("site.yml")
    assert leaving.ssh(f"test ! -e {drop_in} && {restart}").stdout.strip() == "always"
    before = _pids(cluster)["worker2"].split()
    leaving.ssh("systemctl kill --signal=KILL llm-ray-worker")
    until(lambda: not {*_pids(cluster)["worker2"].split()} <= {"0", *before}, "the worker starts again")
    cluster.wait_for_nodes(cluster.nodes)
    assert cluster.play("site.yml").changes() == []


def test_a_worker_leaves_when_its_tasks_have_ended(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    leaving = cluster.hosts["worker2"]
    before = _pids(cluster)
    code = f"""
import ray, time, threading
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(log_to_driver=False, logging_level='error')
node = next(n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == "{leaving.address}")
@ray.remote(num_cpus=1, scheduling_strategy=On(node, soft=False))
def work():
    open("/srv/llm-ray/runs/began", "w").close()
    time.sleep(40)
    open("/srv/llm-ray/runs/ended", "w").close()
ray.get(work.remote())
"""
    cluster.head.ssh(f"cat > /tmp/work.py <<'END'\n{code}\nEND\nsystemd-run --unit=work --quiet -p "
        "EnvironmentFile=/etc/llm-ray/ray.env "
                     "/opt/llm-ray/current/bin/python /tmp/work.py")  # fmt: skip
    until(lambda: cluster.head.ssh("test -e /srv/llm-ray/runs/began", check=False).returncode == 0, "the task begins")
    run = cluster.play("remove_node.yml", "-e", "node=worker2")
    assert (
        cluster.head.ssh("systemctl is-failed work; ls /srv/llm-ray/runs/ended").stdout.split()[-1]
        == "/srv/llm-ray/runs/ended"
    )
    cluster.head.ssh("rm /srv/llm-ray/runs/began /srv/llm-ray/runs/ended")
    assert "remove it from ray_workers" in " ".join(run.output.split())
    assert leaving.ssh(_PARTS, check=False).stdout == ""
    assert leaving.ssh("pgrep -u 1200; getent passwd ray; nft list table inet llm_ray", check=False).stdout == ""
    others = [host for host in cluster.nodes if host is not leaving]
    for host in others:
        assert leaving.address not in host.ssh("cat /etc/hosts; nft list table inet llm_ray").stdout
    assert _pids(cluster) == before | {"worker2": _pids(cluster)["worker2"]}
    cluster.wait_for_nodes(others)


def test_a_worker_of_other_software_than_the_cluster_is_not_added(cluster: Cluster) -> None:
    module = cluster.bundle / "llm_ray" / "__init__.py"
    before = module.read_text()
    module.write_text(f"{before}\n")
    try:
        run = cluster.play("add_node.yml", "-e", "node=worker2", ok=False)
    finally:
        module.write_text(before)
    assert run.code != 0
    assert "head: the cluster does not run the software of this bundle" in " ".join(run.output.split())
    assert run.changed == 0


def test_no_worker_is_added_behind_the_heads_back(cluster: Cluster) -> None:
    run = cluster.play("add_node.yml", "-e", "node=worker2", "--limit", "worker2", ok=False)
    assert run.code != 0
    assert "--limit leaves out head" in run.output
    assert run.changed == 0


def test_an_upgrade_leaves_out_a_host_that_is_no_node_yet(cluster: Cluster) -> None:
    before = _pids(cluster)
    run = cluster.play("upgrade.yml")
    assert "worker2 is not a node yet and is skipped" in " ".join(run.output.split())
    assert run.hosts["worker2"]["changed"] == 0
    assert _pids(cluster) == before


def test_a_new_worker_joins_and_the_others_are_let_alone(cluster: Cluster) -> None:
    before = _pids(cluster)
    run = cluster.play("add_node.yml", "-e", "node=worker2")
    cluster.wait_for_nodes(cluster.nodes)
    after = _pids(cluster)
    assert {name: pid for name, pid in after.items() if name != "worker2"} == {
        n: p for n, p in before.items() if n != "worker2"
    }
    elsewhere = [task for task in run.changes() if ": [worker2]" not in task]
    assert [task for task in elsewhere if not task.startswith(_LISTS)] == []
    again = cluster.play("add_node.yml", "-e", "node=worker2")
    assert again.changes() == []
