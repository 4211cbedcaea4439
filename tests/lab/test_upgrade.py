"""upgrade.yml: everything is staged before anything stops; the way back is kept."""

from __future__ import annotations

import pytest

from tests.lab.cluster import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.long]


def _running(cluster: Cluster) -> set[str]:
    """The environments that the nodes' processes run from."""
    shown = "cat /proc/$(systemctl show --value -p MainPID llm-ray-head llm-ray-worker | grep -v '^0*$' | head -1)/cmdline | tr '\\0' ' '"
    return {host.ssh(shown).stdout.split()[0].partition("/bin/")[0] for host in cluster.nodes}


def _version(cluster: Cluster) -> str:
    return cluster.ray("import llm_ray; print(llm_ray.__version__)").strip()


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
        assert "PLAY [Ray stops and starts together]" not in broken.output
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
