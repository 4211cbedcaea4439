"""upgrade.yml: everything is staged before anything stops; the way back is kept."""

from __future__ import annotations

import pytest

from tests.lab.cluster import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.long]


def _running(cluster: Cluster) -> set[str]:
    """The environments that the nodes' processes run from."""
    shown = "cat /proc/$(systemctl show --value -p MainPID llm-ray-head llm-ray-worker | grep -v '^0*$' | head -1)/cmdline | tr '\\0' ' '"
    return {host.ssh(shown).stdout.split()[0].partition("/bin/")[0] for host in cluster.nodes}


def _pids(cluster: Cluster) -> dict[str, str]:
    return {
        host.name: host.ssh("systemctl show --value -p MainPID llm-ray-head llm-ray-worker").stdout
        for host in cluster.nodes
    }


def _version(cluster: Cluster) -> str:
    return cluster.ray("import llm_ray; print(llm_ray.__version__)").strip()


def _environments(cluster: Cluster) -> dict[str, set[str]]:
    """The environments that lie on each host."""
    return {host.name: {*host.ssh("ls -d /opt/llm-ray/env/*").stdout.split()} for host in cluster.nodes}


def _cut_off(cluster: Cluster, *arguments: str, at: str = "Start Ray, the head first") -> None:
    """upgrade.yml, which dies when Ray is stopped, and all is switched or not yet."""
    cluster.cut_off("upgrade.yml", *arguments, at=at)
    state = "systemctl is-active llm-ray-head llm-ray-worker"
    assert all("active" not in host.ssh(state, check=False).stdout.split() for host in cluster.nodes)


def test_upgrade_and_back(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    old, old_version = _running(cluster), _version(cluster)
    assert len(old) == 1
    module = cluster.bundle / "llm_ray" / "__init__.py"
    before = module.read_text()
    worker = cluster.workers[1]
    try:
        module.write_text(before.replace(old_version, "9.9.9"))
        # Staging fails on one host: nowhere is anything stopped.
        worker.ssh("mount --bind /opt/llm-ray/env /opt/llm-ray/env && mount -o remount,bind,ro /opt/llm-ray/env")
        broken = cluster.play("upgrade.yml", ok=False)
        assert broken.code != 0
        assert "PLAY [Restart Ray with the new software]" not in broken.output
        assert _running(cluster) == old
    finally:
        worker.ssh("umount /opt/llm-ray/env")
    try:
        cluster.play("upgrade.yml")
        new = _running(cluster)
        assert len(new) == 1
        assert new != old
        assert _version(cluster) == "9.9.9"
        assert cluster.play("upgrade.yml").changes() == []
        cluster.play("upgrade.yml", "-e", "rollback=true")
        assert _running(cluster) == old
        assert cluster.play("upgrade.yml", "-e", "rollback=true").changes() == []
        cluster.wait_for_nodes(cluster.nodes)
    finally:
        module.write_text(before)


def test_an_upgrade_that_is_cut_off_is_finished_by_the_next_run(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    old, old_version = _running(cluster), _version(cluster)
    module = cluster.bundle / "llm_ray" / "__init__.py"
    before = module.read_text()
    try:
        module.write_text(before.replace(old_version, "9.9.9"))
        # Nothing is switched yet: one may go back to what ran.
        _cut_off(cluster, at="Switch to the prepared environment")
        cluster.play("upgrade.yml", "-e", "rollback=true")
        assert _running(cluster) == old
        cluster.wait_for_nodes(cluster.nodes)
        _cut_off(cluster)
        cluster.play("upgrade.yml")
        new = _running(cluster)
        assert len(new) == 1
        assert new != old
        assert _version(cluster) == "9.9.9"
        cluster.wait_for_nodes(cluster.nodes)
        # A host that does not run what is installed starts alone.
        cluster.workers[1].ssh("systemctl stop llm-ray-worker")
        pids = _pids(cluster)
        cluster.play("upgrade.yml")
        assert {name for name, pid in _pids(cluster).items() if pid != pids[name]} == {cluster.workers[1].name}
        cluster.wait_for_nodes(cluster.nodes)
        _cut_off(cluster, "-e", "rollback=true")
        cluster.play("upgrade.yml", "-e", "rollback=true")
        assert _running(cluster) == old
        cluster.wait_for_nodes(cluster.nodes)
    finally:
        module.write_text(before)


def test_a_host_that_is_down_is_left_out_and_old_environments_go(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    (old,), old_version = _running(cluster), _version(cluster)
    module = cluster.bundle / "llm_ray" / "__init__.py"
    before = module.read_text()
    down, others = cluster.workers[1], [cluster.head, cluster.workers[0]]
    try:
        down.cut()
        module.write_text(before.replace(old_version, "9.9.8"))
        cluster.play("upgrade.yml", "--limit", f"all:!{down.name}")
        assert _version(cluster) == "9.9.8"
        cluster.wait_for_nodes(others)
    finally:
        down.plug()
    try:
        cluster.play("site.yml")
        cluster.wait_for_nodes(cluster.nodes)
        (new,) = _running(cluster)
        assert all(there == {old, new} for there in _environments(cluster).values())
        cluster.play("upgrade.yml", "-e", "rollback=true")
        assert _running(cluster) == {old}
        assert all(there == {old, new} for there in _environments(cluster).values())
        cluster.wait_for_nodes(cluster.nodes)
    finally:
        module.write_text(before)
