"""The firewall role with firewalld: two hosts of a cluster, SSH on a port that firewalld does not know, and a host
outside."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.lab.cluster import Cluster, Run, copy_bundle
from tests.lab.hosts import Host, lab

pytestmark = [pytest.mark.lab, pytest.mark.long]

_SSH = [22, 2222, 50022]  # the last is in no inventory, and among the ports that are closed
_SERVED = [7860, 8000]
_RAY = [6379, 20500]
_OTHER = [5555]
_ALL = sorted(_SSH + _SERVED + _RAY + _OTHER)
_LISTEN = f"""
import select, socket
sockets = [socket.create_server(("0.0.0.0", port)) for port in {sorted(_SERVED + _RAY + _OTHER)}]
while True:
    for ready in select.select(sockets, [], [])[0]:
        ready.accept()[0].close()
"""
_REMOVE = """
- hosts: all
  become: true
  gather_facts: false
  tasks: [{ansible.builtin.include_role: {name: firewall, tasks_from: remove}}]
"""


@pytest.fixture(scope="module")
def hosts(lab_ready: None) -> Iterator[Cluster]:
    """head and worker1 with sshd on two ports; the head listens on others, too; outside is in no inventory."""
    folder = Path(tempfile.mkdtemp(prefix="llm-ray-lab-"))
    with lab(folder) as made:
        copy_bundle(folder / "bundle")
        (folder / "bundle/remove.yml").write_text(_REMOVE)
        made.add("head", "worker1", "outside")
        for name in ("head", "worker1"):
            made.hosts[name].ssh(
                r"printf 'Port 22\nPort 2222\nPort 50022\n' > /etc/ssh/sshd_config.d/ports.conf; systemctl restart ssh"
            )
            known = made.hosts[name].known_hosts
            address = made.hosts[name].address
            (key,) = [line for line in known.read_text().splitlines() if line.startswith(f"{address} ")]
            known.write_text(f"{known.read_text()}[{address}]:2222 {key.partition(' ')[2]}\n")
        _listen(made.hosts["head"])
        groups = {"ray_head": ["head"], "ray_workers": ["worker1"]}
        own = {"firewall_provider": "firewalld", "ansible_port": 2222, "llm_ray_storage": "existing"}
        yield Cluster(made, folder / "bundle", groups, own)


def _listen(head: Host) -> None:
    head.ssh(f"cat > /root/listen.py <<'END'{_LISTEN}END\nsystemd-run --unit=listen python3 /root/listen.py")


def _open(scanner: Host, target: Host, ports: Sequence[int] = _ALL) -> list[int]:
    """Which of these can be reached; ten seconds are bounded, since what is dropped does not answer."""
    each = f"timeout 1 bash -c '</dev/tcp/{target.address}/$0' $port 2>/dev/null && echo $port"
    said = scanner.ssh(f"for port in {' '.join(map(str, ports))}; do {each}; done; true").stdout
    return [int(port) for port in said.split()]


def _site(hosts: Cluster, **variables: object) -> Run:
    return hosts.play("site.yml", "--tags", "firewall", "-e", json.dumps(variables))


@pytest.fixture(scope="module")
def closed(hosts: Cluster) -> Cluster:
    """The hosts after check mode and the first run."""
    checked = hosts.play("site.yml", "--check", "--diff", "--tags", "firewall")
    assert '<policy priority="-10"' in checked.output
    assert _open(hosts.hosts["outside"], hosts.head) == _ALL
    assert hosts.head.ssh("ls -d /etc/firewalld", check=False).stdout == ""
    _site(hosts)
    return hosts


def test_who_reaches_what(closed: Cluster) -> None:
    assert _open(closed.hosts["outside"], closed.head) == _SSH
    assert _open(closed.hosts["worker1"], closed.head) == _ALL
    assert closed.head.ssh("timeout 2 bash -c '</dev/tcp/127.0.0.1/6379'").returncode == 0


def test_a_second_run_changes_nothing(closed: Cluster) -> None:
    second = _site(closed)
    assert second.changed == 0, second.changes()


def test_an_admin_network_reaches_what_is_served_beside_what_it_did_before(closed: Cluster) -> None:
    outside = closed.hosts["outside"]
    closed.head.ssh("firewall-cmd -q --add-port=5555/tcp")  # of the host's own zone, at run time: kept over no reload
    assert _open(outside, closed.head) == sorted(_SSH + _OTHER)
    closed.head.ssh("firewall-cmd -q --permanent --add-port=5555/tcp")
    _site(closed, llm_ray_admin_networks=[f"{outside.address}/32"])
    assert _open(outside, closed.head) == sorted(_SSH + _SERVED + _OTHER)
    _site(closed)
    closed.head.ssh("firewall-cmd -q --permanent --remove-port=5555/tcp; firewall-cmd -q --reload")
    assert _open(outside, closed.head) == _SSH


@pytest.mark.parametrize(("zone", "reached"), [("trusted", sorted(_SSH + _OTHER)), ("drop", _SSH)])
def test_no_zone_opens_the_clusters_ports_or_closes_ssh(closed: Cluster, zone: str, reached: list[int]) -> None:
    before = closed.head.ssh("firewall-cmd --get-default-zone").stdout.strip()
    closed.head.ssh(f"firewall-cmd -q --set-default-zone={zone}")
    try:
        assert _open(closed.hosts["outside"], closed.head) == reached
        assert _open(closed.hosts["worker1"], closed.head) == _ALL
    finally:
        closed.head.ssh(f"firewall-cmd -q --set-default-zone={before}")


def test_ssh_stays_open_where_all_is_closed(closed: Cluster) -> None:
    _site(closed, firewall_cluster_ports=["1-65535"], firewall_served_ports=["22"], firewall_cluster=["192.0.2.1"])
    assert _open(closed.hosts["outside"], closed.head) == _SSH
    _site(closed)
    assert _open(closed.hosts["worker1"], closed.head) == _ALL


def test_what_is_loaded_is_what_is_configured(closed: Cluster) -> None:
    """As after a run that was cut off before it reloaded firewalld."""
    closed.head.ssh("firewall-cmd -q --policy=llm-ray --remove-port=2222/tcp")
    assert _site(closed).hosts["head"]["changed"] > 0
    assert _open(closed.hosts["outside"], closed.head) == _SSH


def test_it_holds_after_a_reboot(closed: Cluster) -> None:
    closed.head.reboot()
    _listen(closed.head)
    assert _open(closed.hosts["outside"], closed.head) == _SSH
    assert _open(closed.hosts["worker1"], closed.head) == _ALL


def test_remove_restores(closed: Cluster) -> None:
    outside = closed.hosts["outside"]
    closed.play("remove.yml")
    assert _open(outside, closed.head) == _ALL
    assert closed.head.ssh("systemctl is-enabled firewalld", check=False).stdout.strip() == "disabled"
    assert closed.head.ssh("find /etc/firewalld -name 'llm-ray*'").stdout == ""
    assert closed.play("remove.yml").changed == 0


def test_firewalld_that_ran_before_goes_on_as_it_was(closed: Cluster) -> None:
    outside, head = closed.hosts["outside"], closed.head
    head.ssh(
        "systemctl enable -q --now firewalld; firewall-cmd -q --permanent --add-port={2222,50022}/tcp; firewall-cmd -q "
        "--reload"
    )
    before = head.ssh("firewall-cmd --list-all-zones").stdout
    _site(closed, firewall_provider="auto")
    assert _open(outside, head) == _SSH
    closed.play("remove.yml")
    assert head.ssh("firewall-cmd --state").stdout.strip() == "running"
    assert head.ssh("firewall-cmd --list-all-zones").stdout == before
    assert _open(outside, head) == _SSH
