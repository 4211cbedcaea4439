"""Five hosts, of which the last two are in a group of their own with resources, labels and a folder for objects that do
not fit the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab import cluster as lab_cluster
from tests.lab.cluster import Cluster
from tests.waiting import until

pytestmark = [pytest.mark.lab, pytest.mark.long]

# Two objects fit into the lab's object store: the others go to disk.
_SPILL = """
import numpy, ray
ray.init(log_to_driver=False, logging_level="error")
@ray.remote(num_cpus=1, resources={"disk": 1}, label_selector={"rack": "b"})
class Keeper:
    def keep(self):
        self.kept = [ray.put(numpy.full(60 * 2**20, n, dtype=numpy.uint8)) for n in range(6)]
        return ray.util.get_node_ip_address()
    def read(self):
        return [int(ray.get(one)[-1]) for one in self.kept]
keeper = Keeper.options(name="keeper", lifetime="detached", namespace="test").remote()
print("ON", ray.get(keeper.keep.remote()))
"""
_READ = """
import ray
ray.init(log_to_driver=False, logging_level="error", namespace="test")
keeper = ray.get_actor("keeper")
print("READ", ray.get(keeper.read.remote()))
ray.kill(keeper)
"""


@pytest.fixture(scope="module")
def five(lab_ready: None) -> Iterator[Cluster]:
    """After site.yml."""
    workers = [f"worker{n}" for n in range(1, 5)]
    groups = {"ray_head": ["head"], "ray_workers": workers, "rack_b": workers[2:]}
    with lab_cluster.cluster(groups, ray_node_cpus=1) as made:
        own = {"ray_node_spill": "/var/spill", "ray_node_resources": {"disk": 1}, "ray_node_labels": {"rack": "b"}}
        folder = made.lab.inventory(made.groups, **made.variables) / "group_vars"
        folder.mkdir()
        (folder / "rack_b.yml").write_text(yaml.safe_dump(own))
        made.play("site.yml", timeout=3000)
        yield made


def test_all_are_nodes_and_a_second_run_changes_nothing(five: Cluster) -> None:
    five.wait_for_nodes(five.nodes)
    assert five.play("site.yml").changes() == []


def test_objects_that_do_not_fit_the_store_go_to_the_hosts_folder(five: Cluster) -> None:
    address = five.ray(_SPILL).rpartition("ON ")[2].strip()
    (host,) = [host for host in five.workers[2:] if host.address == address]
    until(lambda: bool(host.ssh("find /var/spill/llm-ray -type f").stdout), "objects are on disk")
    assert host.ssh("stat -c '%U %a' /var/spill/llm-ray").stdout.split() == ["ray", "700"]
    assert five.workers[0].ssh("ls -d /var/spill", check=False).stdout == ""
    assert json.loads(five.ray(_READ).rpartition("READ ")[2]) == list(range(6))


def test_it_is_validated(five: Cluster, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    five.play("validate.yml", "-e", f"validate_report={report}")
    findings = json.loads(report.read_text())["findings"]
    assert {one["host"] for one in findings if one["check"] == "node"} == {host.name for host in five.nodes}
    assert {one["result"] for one in findings} == {"passed"}


def test_one_leaves_and_comes_back(five: Cluster) -> None:
    five.play("remove_node.yml", "-e", "node=worker4")
    five.wait_for_nodes(five.nodes[:-1])
    five.play("add_node.yml", "-e", "node=worker4")
    five.wait_for_nodes(five.nodes)
    assert five.play("site.yml").changes() == []
