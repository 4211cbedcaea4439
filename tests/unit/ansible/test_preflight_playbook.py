"""What only Ansible itself shows of preflight: values that are not to be known before hosts are asked, and vaults."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.unit.ansible.conftest import playbook

_HOST = "127.0.0.1"
_HEAD = "{{ hostvars[groups['ray_head'][0]].ansible_facts.default_ipv4.address }}"


def _inventory(**variables: Any) -> dict[str, Any]:
    """Of one host that is not reached, so that nothing is known of it."""
    return {"ray_head": {"hosts": {_HOST: {"ansible_port": 1, "ansible_connection": "ssh"} | variables}}}


def test_values_of_facts_that_are_not_cached_are_left_for_later(tmp_path: Path) -> None:
    variables = {
        "ray_node_address": "{{ ansible_facts['ens1f0']['ipv4']['address'] }}",
        "docker_engine_provider": "{{ 'docker_ce' if ansible_facts['os_family'] == 'RedHat' else 'distribution' }}",
        "monitoring_provider": "{{ of_facts }}",
        "of_facts": "{{ 'archive' if ansible_facts.os_family == 'RedHat' else 'packages' }}",
        "ray_node_head_address": _HEAD,
        "nfs_server_address": "{{ ansible_host }}",
        "ray_node_max_worker_port": "{{ ray_node_min_worker_port + 999 }}",  # a default of the same role
        "host_base_sysctl": {"vm.nr_hugepages": "{{ ansible_facts.memtotal_mb // 4 }}"},
    }
    done = playbook(tmp_path, _inventory(**variables))
    assert "cannot be evaluated" not in done.stdout
    assert "UNREACHABLE!" in done.stdout


def test_what_is_wrong_whatever_the_facts_are_is_told(tmp_path: Path) -> None:
    variables = {
        "llm_ray_cluster_name": "{{ site.name }}",
        "site": {"nam": "x"},
        "llm_ray_home": "{{ llm_ray_stat }}/x",
    }
    variables["firewall_served_ports"] = [
        "{{ ray_node_client_port }}"
    ]  # a default of another role, which is not there in firewall's play
    done = playbook(tmp_path, _inventory(**variables))
    assert (
        f"{_HOST}: llm_ray_cluster_name: cannot be evaluated: object of type 'dict' has no attribute 'name'"
        in done.stdout
    )
    assert f"{_HOST}: llm_ray_home: cannot be evaluated: 'llm_ray_stat' is undefined" in done.stdout
    assert f"{_HOST}: firewall_served_ports: cannot be evaluated: 'ray_node_client_port' is undefined" in done.stdout


def test_a_value_of_facts_is_not_compared_with_one_that_is_not_known_yet(tmp_path: Path) -> None:
    """As where the facts of some hosts alone are cached."""
    value = "{{ '/srv/ray' if ansible_facts['os_family'] == 'RedHat' else '/var/lib/llm-ray' }}"
    facts = {"ansible.builtin.set_fact": {"os_family": "Debian", "cacheable": True}}
    (tmp_path / "known.yml").write_text(
        yaml.safe_dump([{"hosts": "ray_head", "gather_facts": False, "tasks": [facts]}])
    )
    inventory = _inventory(llm_ray_state=value)
    inventory["ray_workers"] = {
        "hosts": {"127.0.0.2": {"ansible_port": 1, "ansible_connection": "ssh", "llm_ray_state": value}}
    }
    inventory["all"] = {"vars": {"llm_ray_storage": "existing"}}
    assert playbook(tmp_path, inventory, name=str(tmp_path / "known.yml")).returncode == 0
    done = playbook(tmp_path, inventory)
    assert "must be the same on every host" not in done.stdout
    assert "UNREACHABLE!" in done.stdout


def test_a_vault_without_its_password_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("x")
    command = [
        str(Path(sys.executable).parent / "ansible-vault"),
        "encrypt",
        "--vault-password-file",
        str(tmp_path / "password"),
    ]
    vaulted = subprocess.run(command, input="secret", check=True, capture_output=True, text=True).stdout
    folder = tmp_path / "host_vars"
    folder.mkdir()
    block = "".join(f"  {line}\n" for line in vaulted.splitlines())
    (folder / f"{_HOST}.yml").write_text(
        f"mine: !vault |\n{block}llm_ray_cluster_name: '{{{{ mine }}}}'\nnfs_client_server: '{{{{ vault_decoy }}}}'\n"
    )
    done = playbook(tmp_path, _inventory())
    assert "llm_ray_cluster_name" not in done.stdout
    assert f"{_HOST}: nfs_client_server: cannot be evaluated: 'vault_decoy' is undefined" in done.stdout


def test_hosts_are_judged_by_their_own_variables(tmp_path: Path) -> None:
    """This machine under three names, each with variables of its own."""

    def host(n: int, **own: Any) -> dict[str, Any]:
        here = {"ansible_host": f"127.0.0.{n}", "ansible_connection": "local", "ansible_become": False}
        return (
            here
            | {"ansible_python_interpreter": sys.executable, "preflight_min_cores": 1, "preflight_allow_other_os": True}
            | own
        )

    everywhere = {
        "monitoring_enabled": True,
        "llm_ray_uid": 59990,
        "ray_node_max_worker_port": "{{ ray_node_min_worker_port + 999 }}",
    }
    inventory = {
        "all": {"vars": everywhere},
        "ray_head": {"hosts": {"a": host(1, preflight_min_cores=9999)}},
        "ray_workers": {"hosts": {"b": host(2, ray_node_address="{{ ansible_facts['ens1f0x'].ipv4.address }}")}},
        "nfs_server": {"hosts": {"c": host(3, preflight_min_cores=9999, preflight_min_disk_gib=99999999)}},
    }
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        everywhere |= {
            "monitoring_port": first.getsockname()[1],
            "monitoring_node_exporter_port": second.getsockname()[1],
        }
        told = playbook(tmp_path, inventory).stdout
    assert "a: cores = " in told, told
    assert "a: monitoring_port = " in told  # the head's alone
    assert "all: monitoring_node_exporter_port = " in told
    assert "b: ray_node_address: is computed from a fact that this host lacks" in told
    assert "c: disk of /srv/llm-ray = " in told
    assert "cores: at least 9999 are needed" in told
    assert "c: cores" not in told
    assert "c: disk of /opt/llm-ray" not in told
