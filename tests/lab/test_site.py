"""site.yml on three bare hosts: check mode, a first run, a second one, and what hosts that fail do to it."""

from __future__ import annotations

import pytest

from tests.lab.cluster import Cluster
from tests.lab.conftest import First

pytestmark = pytest.mark.lab


def test_check_mode_works_on_bare_hosts(first: First) -> None:
    assert {stats["failed"] + stats["unreachable"] for stats in first.check.hosts.values()} == {0}


def test_every_host_is_a_node_of_ray_and_runs_a_task(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)


def test_a_second_run_changes_nothing_and_is_fast(cluster: Cluster, first: First) -> None:
    second = cluster.play("site.yml")
    assert second.changes() == []
    assert second.changed == 0
    assert second.seconds < first.site.seconds / 4
