"""What the firewall lets in, as both of its files say it: SSH where it listens, ports as the inventory has them, hosts
that --limit leaves out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.unit.ansible.conftest import load

ROOT = Path(__file__).parents[3]
_VARS = ["defaults", "vars"]


@pytest.fixture(scope="module")
def sshd() -> ModuleType:
    return load("roles/firewall/library/firewall_sshd.py")


def play(
    folder: Path, tasks: list[dict[str, Any]], hosts: dict[str, dict[str, Any]], *roles: str, **variables: Any
) -> str:
    """What a playbook of these tasks says, run on the head alone; the other hosts are w1 and nas, the NFS server."""
    groups = {"ray_head": "head", "ray_workers": "w1", "nfs_server": "nas"}
    inventory = {group: {"hosts": {host: hosts.get(host, {})}} for group, host in groups.items()}
    files = [str(ROOT / f"roles/{role}/{part}/main.yml") for role in roles for part in _VARS]
    playbook = {"hosts": "all", "gather_facts": False, "vars_files": files, "vars": variables, "tasks": tasks}
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    (folder / "play.yml").write_text(yaml.safe_dump([playbook]))
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
        "HOME": str(folder),
    }
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "-i",
        "hosts.yml",
        "play.yml",
        "--limit",
        "head:nas" if roles else "head",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"ANSIBLE_NOCOLOR": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


_HERE = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
HOSTS: dict[str, dict[str, Any]] = {
    "head": {"ansible_host": "10.0.0.1", "ansible_port": 2222} | _HERE,
    "w1": {"ansible_host": "10.0.0.2"},
    "nas": {"ansible_host": "10.0.0.3"} | _HERE,
}
SETTINGS = {
    "__firewall_sshd": {"ports": [22, 50022]},
    "monitoring_enabled": True,
    "monitoring_port": 9191,
    "monitoring_node_exporter_port": 9200,
    "nfs_server_clients": ["10.1.0.7", "10.1.1.0/24", "fd00::/64", "client.example.com"],
    "llm_ray_serve_port": 9000,
    "llm_ray_admin_networks": ["192.0.2.0/24"],
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files of the head and of the NFS server, as HOST.firewall.nft.j2 and HOST.policy.xml.j2."""
    folder = tmp_path_factory.mktemp("firewall")
    write = {
        "src": f"{ROOT}/roles/firewall/templates/{{{{ item }}}}",
        "dest": f"{folder}/{{{{ inventory_hostname }}}}.{{{{ item }}}}",
    }
    said = play(
        folder,
        [{"ansible.builtin.template": write, "loop": ["firewall.nft.j2", "policy.xml.j2"]}],
        HOSTS,
        "firewall",
        **SETTINGS,
    )
    assert (folder / "nas.policy.xml.j2").is_file(), said
    return folder


def nft_set(text: str, name: str) -> set[str]:
    """Elements of a set of nftables."""
    (body,) = re.findall(rf"set {name} {{(.*?)\n    }}", text, re.S)
    return {one for found in re.findall(r"elements = { (.*) }", body) for one in found.split(", ")}


def test_ssh_stays_open_where_sshd_listens(rendered: Path) -> None:
    assert "tcp dport { 22, 2222, 50022 } accept" in (rendered / "head.firewall.nft.j2").read_text()
    policy = (rendered / "head.policy.xml.j2").read_text()
    assert re.findall(r'^  <port port="(\d+)" protocol="tcp"/>', policy, re.M) == ["22", "2222", "50022"]


def test_ports_of_monitoring_and_of_the_endpoint_are_those_of_the_inventory(rendered: Path) -> None:
    rules, policy = ((rendered / f"head.{name}.j2").read_text() for name in ("firewall.nft", "policy.xml"))
    assert {"9191", "9200"} <= nft_set(rules, "cluster_only")
    assert {"9090", "9100"} & nft_set(rules, "cluster_only") == set()
    assert nft_set(rules, "served") == {"9000", "7860"}
    dropped = set(re.findall(r'<rule priority="1"><port port="([\d-]+)" protocol="tcp"/><drop/>', policy))
    assert dropped == nft_set(rules, "cluster_only") | nft_set(rules, "served")
    assert '<source address="192.0.2.0/24"/><port port="9000" protocol="tcp"/><accept/>' in policy


def test_ports_that_the_bundle_does_not_use_are_not_closed(tmp_path: Path) -> None:
    """They are another Prometheus', another node exporter's, Cockpit's."""
    not_gone_yet = {"__firewall_watching": {"files": [{"path": "/etc/systemd/system/llm-ray-node-exporter.service"}]}}
    for settings, head, nas in (
        ({}, set(), set()),
        (not_gone_yet, {"9100"}, {"9100"}),
        ({"monitoring_enabled": True, "monitoring_node_exporter": False}, {"9090"}, set()),
        ({"monitoring_enabled": True}, {"9090", "9100"}, {"9100"}),
    ):
        tell = {
            "ansible.builtin.debug": {"msg": "PORTS {{ inventory_hostname }} {{ firewall_cluster_ports | join(' ') }}"}
        }
        said = play(tmp_path, [tell], HOSTS, "firewall", **settings)
        ports = {
            host: {*words.split()} & {"9090", "9100"} for host, words in re.findall(r"PORTS (\w+) ([\d -]+)", said)
        }
        assert ports == {"head": head, "nas": nas}, said


_GATEWAY = "203.0.113.7"


@pytest.mark.parametrize(
    ("role", "shown"), [("firewall", "__firewall_addresses"), ("nfs_server", "__nfs_server_cluster")]
)
def test_a_gateway_before_the_hosts_is_not_one_of_them(tmp_path: Path, role: str, shown: str) -> None:
    facts = {"default_ipv4": {"address": "10.9.0.2"}, "all_ipv4_addresses": ["10.9.0.2", "172.16.0.2"]}
    for reached, others in ((_GATEWAY, ["10.9.0.2"]), ("172.16.0.2", ["10.9.0.2", "172.16.0.2"])):
        known = {"ansible.builtin.set_fact": facts | {"cacheable": True}, "delegate_to": "w1", "delegate_facts": True}
        tell = {"ansible.builtin.debug": {"msg": f"FOUND {{{{ {shown} | join(' ') }}}}."}}
        said = play(tmp_path, [known, tell], HOSTS | {"w1": {"ansible_host": reached}}, role)
        assert {*re.findall(r"FOUND (.*)\.", said)[0].split()} - {"10.0.0.1", "10.0.0.3"} == {*others}, said


def test_clients_of_a_network_of_its_own_reach_nfs_and_nothing_else(rendered: Path) -> None:
    rules, policy = ((rendered / f"nas.{name}.j2").read_text() for name in ("firewall.nft", "policy.xml"))
    assert nft_set(rules, "nfs4") == {"10.1.0.7", "10.1.1.0/24"}
    assert nft_set(rules, "nfs6") == {"fd00::/64"}
    assert [line.strip() for line in rules.splitlines() if "@nfs" in line] == [
        "tcp dport 2049 ip saddr @nfs4 accept",
        "tcp dport 2049 ip6 saddr @nfs6 accept",
    ]
    assert [line.strip() for line in policy.splitlines() if 'address="10.1.' in line or 'address="fd00:' in line] == [
        f'<rule family="ipv4" priority="-1"><source address="{network}"/><port port="2049" '
        'protocol="tcp"/><accept/></rule>'
        for network in ("10.1.0.7", "10.1.1.0/24")
    ] + [
        '<rule family="ipv6" priority="-1"><source address="fd00::/64"/><port port="2049" '
        'protocol="tcp"/><accept/></rule>'
    ]
    head = (rendered / "head.firewall.nft.j2").read_text()
    assert nft_set(head, "nfs4") == nft_set(head, "nfs6") == set()
    assert "10.1." not in (rendered / "head.policy.xml.j2").read_text()


LISTENING = """\
LISTEN 0 128       0.0.0.0:22     0.0.0.0:*  users:(("sshd",pid=10,fd=3))
LISTEN 0 128          [::]:50022     [::]:*  users:(("sshd",pid=10,fd=4))
LISTEN 0 128       0.0.0.0:40001  0.0.0.0:*  users:(("sshd",pid=11,fd=7))
LISTEN 0 128       0.0.0.0:40002  0.0.0.0:*  users:(("sshd",pid=12,fd=3))
LISTEN 0 4096            *:2200         *:*  users:(("sshd",pid=14,fd=3),("systemd",pid=1,fd=90))
LISTEN 0 4096            *:9090         *:*  users:(("systemd",pid=1,fd=91))
LISTEN 0 128       0.0.0.0:40003  0.0.0.0:*  users:(("python3",pid=13,fd=3))
LISTEN 0 128       0.0.0.0:40004  0.0.0.0:*
"""
UNITS = """\
Listen=0.0.0.0:2022 (Stream)
Listen=[::]:2023 (Stream)
Listen=/run/ssh.sock (Stream)
ActiveState=active

Listen=[::]:40005 (Stream)
ActiveState=inactive
"""


def test_where_sshd_listens(sshd: ModuleType) -> None:
    """root's own, by itself or through systemd: not what a session forwards, and no user's program that is called
    so."""
    titles = {
        10: "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups",
        11: "sshd: root@notty",
        14: "/usr/sbin/sshd -D",
    }
    processes = {pid: (0, title) for pid, title in titles.items()} | {12: (1000, "/usr/sbin/sshd -D")}
    assert sshd.listening(LISTENING, processes.get) == {22, 50022, 2200}
    assert sshd.activated(UNITS) == {2022, 2023}
    assert sshd.activated("") == set()


# Hosts that --limit leaves out

_SHOW: list[dict[str, Any]] = [
    {"ansible.builtin.include_role": {"name": "firewall", "tasks_from": "peers", "public": True}},
    {"ansible.builtin.debug": {"msg": "ADDRESSES {{ __firewall_addresses | join(' ') }}"}},
]


def test_a_host_that_is_not_known_is_resolved(tmp_path: Path) -> None:
    said = play(tmp_path, _SHOW, HOSTS | {"w1": {"ansible_host": "localhost"}, "nas": {"ansible_host": "10.0.0.3"}})
    (addresses,) = re.findall(r"ADDRESSES (.*)", said)
    assert {"10.0.0.1", "10.0.0.3", "127.0.0.1"} <= set(addresses.split()), said


def test_no_rules_are_written_without_a_host(tmp_path: Path) -> None:
    said = play(tmp_path, _SHOW, HOSTS | {"w1": {"ansible_host": "w1.invalid"}, "nas": {"ansible_host": "10.0.0.3"}})
    assert "w1: its address is unknown" in said
    assert "ADDRESSES" not in said
