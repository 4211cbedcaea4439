"""add_node.yml and remove_node.yml: one worker comes and goes, and the others notice nothing but the list of who belongs."""

from __future__ import annotations

import pytest

from tests.lab.cluster import Cluster, until

pytestmark = [pytest.mark.lab, pytest.mark.long]

_LISTS = ("host_base : In /etc/hosts", "firewall : ")
# Where the bundle's parts lie on a host.
_PARTS = (
    "ls -d /etc/llm-ray /opt/llm-ray /var/lib/llm-ray /etc/systemd/system/llm-ray-* /run/systemd/system/llm-ray-* /usr/local/bin/llm-ray"
)


def _pids(cluster: Cluster) -> dict[str, str]:
    """The process of Ray's unit on each host."""
    return {host.name: host.ssh("systemctl show --value -p MainPID 'llm-ray-head' 'llm-ray-worker'").stdout for host in cluster.nodes}


@pytest.mark.parametrize("node", ["all", "head", "worker1,worker2", "wroker2"])
def test_only_one_worker_may_be_named(cluster: Cluster, node: str) -> None:
    run = cluster.play("remove_node.yml", "-e", f"node={node}", ok=False)
    assert run.code != 0
    assert f"node = {node}" in run.output
    assert run.changed == 0
    assert "PLAY [Its work ends]" not in run.output


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
    cluster.head.ssh(f"cat > /tmp/work.py <<'END'\n{code}\nEND\nsystemd-run --unit=work --quiet -p EnvironmentFile=/etc/llm-ray/ray.env "
                     "/opt/llm-ray/current/bin/python /tmp/work.py")  # fmt: skip
    until(lambda: cluster.head.ssh("test -e /srv/llm-ray/runs/began", check=False).returncode == 0, "the task begins")
    run = cluster.play("remove_node.yml", "-e", "node=worker2")
    assert cluster.head.ssh("systemctl is-failed work; ls /srv/llm-ray/runs/ended").stdout.split()[-1] == "/srv/llm-ray/runs/ended"
    cluster.head.ssh("rm /srv/llm-ray/runs/began /srv/llm-ray/runs/ended")
    assert "take it out of ray_workers" in " ".join(run.output.split())
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


def test_a_new_worker_joins_and_the_others_are_let_alone(cluster: Cluster) -> None:
    before = _pids(cluster)
    run = cluster.play("add_node.yml", "-e", "node=worker2")
    cluster.wait_for_nodes(cluster.nodes)
    after = _pids(cluster)
    assert {name: pid for name, pid in after.items() if name != "worker2"} == {n: p for n, p in before.items() if n != "worker2"}
    elsewhere = [task for task in run.changes() if ": [worker2]" not in task]
    assert [task for task in elsewhere if not task.startswith(_LISTS)] == []
    again = cluster.play("add_node.yml", "-e", "node=worker2")
    assert again.changes() == []
