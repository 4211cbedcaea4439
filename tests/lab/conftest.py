"""Fixtures of the lab: three hosts, and the cluster that site.yml makes of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.lab import cluster as lab_cluster
from tests.lab import docker
from tests.lab.cluster import Cluster, Run
from tests.lab.hosts import missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes the cluster away comes last."""
    items.sort(key=lambda item: "test_reset.py" in item.nodeid)


@dataclass(frozen=True)
class First:
    """What site.yml did on bare hosts: in check mode, then in earnest."""

    check: Run
    after_check: str
    """What of the bundle was on the hosts after check mode."""
    site: Run


@pytest.fixture(scope="session")
def lab_ready() -> None:
    """Ends the session, with exit code 3, on a machine that cannot have a lab; SIGTERM takes the lab down, too."""
    if reason := missing():
        pytest.exit(reason, 3)
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 143))


@pytest.fixture(scope="session")
def bare(lab_ready: None) -> Iterator[Cluster]:
    """Three hosts with nothing on them: head, worker1, worker2."""
    with lab_cluster.cluster({"ray_head": ["head"], "ray_workers": ["worker1", "worker2"]}) as made:
        yield made


@dataclass(frozen=True)
class Made:
    """Three hosts whose nodes run in Docker, and what site.yml did on them."""

    cluster: Cluster
    site: Run


@pytest.fixture(scope="session")
def in_docker(lab_ready: None) -> Iterator[Made]:
    """head, worker1 and worker2 in the other runtime, made by site.yml from a host that has the base image and no
    other."""
    groups = {"ray_head": ["head"], "ray_workers": ["worker1", "worker2"]}
    with lab_cluster.cluster(groups, **docker.VARIABLES) as made:
        for host in made.nodes:
            docker.prepare(host)
        docker.import_base(made)
        yield Made(made, made.play("site.yml", timeout=3000))
    docker.clear_cgroups()


@pytest.fixture(scope="session")
def first(bare: Cluster) -> First:
    check = bare.play("site.yml", "--check", "--diff")
    look = "ls -d /etc/llm-ray /opt/llm-ray /var/lib/llm-ray /srv/llm-ray/* 2>/dev/null; getent passwd ray"
    after = "".join(host.ssh(look, check=False).stdout for host in bare.nodes)
    return First(check, after, bare.play("site.yml"))


@pytest.fixture(scope="session")
def in_venv(bare: Cluster, first: First) -> Cluster:
    """The hosts after site.yml. A test that breaks the cluster leaves it whole again."""
    return bare


@pytest.fixture(scope="session")
def cluster(in_venv: Cluster) -> Cluster:
    """The cluster that is meant where a test does not say which."""
    return in_venv
