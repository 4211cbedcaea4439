"""host_base's packages by rpm and dnf, as on RHEL: a host that has both commands, and a repository of two packages made
on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab.cluster import Cluster, Run, copy_bundle
from tests.lab.hosts import Host, lab

pytestmark = [pytest.mark.lab, pytest.mark.long]

_REPOSITORY = r"""
apt-get update -qq && apt-get install -y -qq --no-install-recommends rpm dnf createrepo-c > /dev/null
spec() { printf "Name: $1\nVersion: 1\nRelease: 1\nSummary: x\nLicense: x\nBuildArch: noarch\n$2\n%%description\nx\n%%files\n" > $1.spec; }
spec tool 'Requires: library' && spec library 'Provides: shared'
rpmbuild --quiet -bb tool.spec library.spec && createrepo_c --quiet rpmbuild/RPMS/noarch
mkdir -p /etc/yum.repos.d
printf '[here]\nname=here\nbaseurl=file:///root/rpmbuild/RPMS/noarch\ngpgcheck=0\n' > /etc/yum.repos.d/here.repo
"""


@pytest.fixture(scope="module")
def host(lab_ready: None) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="llm-ray-lab-"))
    with lab(folder) as made:
        copy_bundle(folder / "bundle")
        (made_host,) = made.add("head")
        made_host.ssh(_REPOSITORY, timeout=600)
        yield Cluster(made, folder / "bundle", {"ray_head": ["head"]}, {})


def _installed(host: Host) -> set[str]:
    return {*host.ssh("rpm --query --all --queryformat '%{NAME}\\n'").stdout.split()}


def _play(cluster: Cluster, tasks: str, names: list[str], *options: str, ok: bool = True) -> Run:
    """The role's tasks, told that the host is RHEL's."""
    variable = f"__host_base_{'wanted' if tasks == 'install' else 'unwanted'}"
    facts = {"ansible.builtin.set_fact": {"os_family": "RedHat", "cacheable": True}}
    include = {"ansible.builtin.include_role": {"name": "host_base", "tasks_from": tasks}, "vars": {variable: names}}
    play = [{"hosts": "all", "become": True, "gather_facts": False, "tasks": [facts, include]}]
    (cluster.bundle / "packages.yml").write_text(yaml.safe_dump(play))
    return cluster.play("packages.yml", *options, ok=ok)


def test_packages_come_once_and_go(host: Cluster) -> None:
    assert _play(host, "install", ["tool", "shared"], "--check", "--diff").changed == 1
    assert _installed(host.head) == set()
    assert _play(host, "install", ["tool", "shared"]).changed == 1
    assert _installed(host.head) == {"tool", "library"}
    host.head.ssh("mv /etc/yum.repos.d/here.repo /root")  # nothing is asked of a mirror where all is there
    try:
        assert _play(host, "install", ["tool", "shared"]).changed == 0
        said = _play(host, "install", ["other"], ok=False).output
        assert "dnf --assumeyes --quiet install other:" in said
    finally:
        host.head.ssh("mv /root/here.repo /etc/yum.repos.d/")
    assert _play(host, "uninstall", ["tool"]).changed == 1
    assert "tool" not in _installed(host.head)
    assert _play(host, "uninstall", ["tool"]).changed == 0
