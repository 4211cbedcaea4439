"""What host_base decides of a host: its packages, and the names in /etc/hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.ansible.conftest import ROOT, playbook


def _told(
    folder: Path, hosts: dict[str, dict[str, Any]], expression: str, family: str = "Debian", **variables: Any
) -> str:
    """What an expression of the role's variables is on the head; of each host its facts."""
    facts = [
        {
            "ansible.builtin.set_fact": own | {"cacheable": True, "os_family": family, "virtualization_type": "kvm"},
            "delegate_to": host,
            "delegate_facts": True,
        }
        for host, own in hosts.items()
    ]
    show = {"ansible.builtin.debug": {"msg": f"TOLD {expression}."}}
    names = ["defaults/main.yml", "vars/main.yml", f"vars/{family.lower()}.yml"]
    files = [str(ROOT / "roles/host_base" / name) for name in names]
    play = {"hosts": "ray_head", "gather_facts": False, "vars_files": files, "vars": variables, "tasks": [*facts, show]}
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    head, *workers = hosts
    inventory = {"ray_head": {"hosts": {head: {}}}, "ray_workers": {"hosts": {host: {} for host in workers}}}
    said = playbook(folder, inventory, name=str(folder / "play.yml")).stdout
    assert "TOLD " in said, said
    return said.partition("TOLD ")[2].partition(".\n")[0]


_HEAD = {"n1": {"default_ipv4": {"address": "10.0.0.1"}, "hostname": "n1"}}


@pytest.mark.parametrize(("keeper", "chrony"), [("", True), ("systemd-timesyncd", False), ("ntpsec", False)])
def test_a_clock_that_is_kept_is_left_alone(tmp_path: Path, keeper: str, chrony: bool) -> None:
    packages = _told(
        tmp_path, _HEAD, "{{ __host_base_all_packages | join(' ') }}", __host_base_clock={"stdout": keeper}
    )
    assert ("chrony" in packages.split()) is chrony, packages


def test_packages_that_not_every_host_can_get_are_not_the_default(tmp_path: Path) -> None:
    packages = "{{ __host_base_all_packages | join(' ') }}"
    assert "gperftools-libs" not in _told(tmp_path, _HEAD, packages, "RedHat", __host_base_clock={"stdout": ""}).split()
    assert "libgoogle-perftools4" in _told(tmp_path, _HEAD, packages, __host_base_clock={"stdout": ""}).split()


def test_names_of_the_hosts(tmp_path: Path) -> None:
    """At the address that Ray has; hostname --fqdn says the first one."""
    hosts = {
        "n1.example.com": {"default_ipv4": {"address": "10.0.0.1"}, "hostname": "n1"},
        "worker": {"default_ipv4": {"address": "10.0.0.2"}, "hostname": "n2"},
        "10.0.0.3": {"default_ipv4": {"address": "10.0.0.3"}, "hostname": "n3"},
        "two": {"default_ipv4": {"address": "192.0.2.4"}, "hostname": "n4", "ray_node_address": "10.0.0.4"},
        "closed": {"default_ipv4": {}, "hostname": "n5", "ray_node_address": "10.0.0.5"},
    }
    lines = _told(
        tmp_path,
        hosts,
        f"{{{{ lookup('ansible.builtin.template', '{ROOT}/roles/host_base/templates/hosts.j2') | trim }}}}",
    )
    assert [line.strip() for line in lines.splitlines()] == [
        "10.0.0.3 n3", "10.0.0.5 n5 closed", "10.0.0.1 n1.example.com n1", "10.0.0.4 n4 two", "10.0.0.2 n2 worker",
    ]  # fmt: skip
