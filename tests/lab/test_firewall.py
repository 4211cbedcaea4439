"""What a host outside the cluster reaches of it: a scan of all ports, from a container that no inventory names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.lab.cluster import Cluster
from tests.lab.hosts import Host

pytestmark = pytest.mark.lab

_SCAN = """
import errno, select, socket, sys, time

address, ports, found = sys.argv[1], list(eval(sys.argv[2])), []
for begin in range(0, len(ports), 3500):
    waiting, poll = {}, select.poll()
    for port in ports[begin:begin + 3500]:
        one = socket.socket()
        one.setblocking(False)
        code = one.connect_ex((address, port))
        if code == errno.EINPROGRESS:
            waiting[one.fileno()] = one, port
            poll.register(one, select.POLLOUT)
        elif code == 0:
            found.append(port)
    end = time.monotonic() + 2
    while waiting:
        ready = poll.poll(max(end - time.monotonic(), 0) * 1000)
        if not ready:
            break
        for number, _ in ready:
            poll.unregister(number)
            one, port = waiting.pop(number)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.append(port)
            one.close()
print(*sorted(found))
"""
_SERVED = [8000, 7860]


def _open_ports(scanner: Host, target: Host, ports: str = "range(1, 65536)") -> list[int]:
    return [
        int(port)
        for port in scanner.ssh(
            f"ulimit -n 4096; python3 - {target.address} '{ports}' <<'END'\n{_SCAN}\nEND", timeout=300
        ).stdout.split()
    ]


@pytest.fixture(scope="module")
def outside(cluster: Cluster) -> Iterator[Host]:
    """A host on the same network that is not in the inventory, while the head serves at all its addresses."""
    for port in _SERVED:
        cluster.head.ssh(f"systemd-run --unit=served-{port} python3 -m http.server {port}")
    (host,) = cluster.lab.add("outside")
    yield host
    for port in _SERVED:
        cluster.head.ssh(f"systemctl stop served-{port}")
    host.remove()
    del cluster.hosts["outside"]


def test_from_outside_only_ssh_is_open(cluster: Cluster, outside: Host) -> None:
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda host: _open_ports(outside, host), cluster.nodes))
    assert found == [[22], [22], [22]]


def test_hosts_of_the_cluster_reach_each_other(cluster: Cluster, outside: Host) -> None:
    first, second = cluster.workers
    assert _open_ports(first, second, "[22, 6380, 6381, 6382, 6383, 6384, 52365]") == [
        22,
        6380,
        6381,
        6382,
        6383,
        6384,
        52365,
    ]
    # the dashboard is on loopback
    assert _open_ports(second, cluster.head, "[6379, 6380, 7860, 8000, 8265]") == [6379, 6380, 7860, 8000]


def test_an_admin_network_reaches_what_is_served_and_no_more(cluster: Cluster, outside: Host) -> None:
    opened = cluster.play(
        "site.yml", "--tags", "firewall", "-e", json.dumps({"llm_ray_admin_networks": [f"{outside.address}/32"]})
    )
    assert opened.changed > 0
    try:
        assert _open_ports(outside, cluster.head) == [22, *sorted(_SERVED)]
    finally:
        cluster.play("site.yml", "--tags", "firewall")
    assert _open_ports(outside, cluster.head, "[22, 7860, 8000]") == [22]


def test_ssh_stays_open_where_sshd_listens(cluster: Cluster, outside: Host) -> None:
    """Also at a port that no inventory names, among those that are closed."""
    conf = "/etc/ssh/sshd_config.d/ports.conf"
    cluster.head.ssh(rf"printf 'Port 22\nPort 50022\n' > {conf}; systemctl restart ssh")
    try:
        cluster.play("site.yml", "--tags", "firewall", "--limit", "head")
        assert _open_ports(outside, cluster.head, "[22, 8000, 50022]") == [22, 50022]
        assert cluster.play("site.yml", "--tags", "firewall", "--limit", "head").changed == 0
    finally:
        cluster.head.ssh(f"rm {conf}; systemctl restart ssh")
        cluster.play("site.yml", "--tags", "firewall")


def test_rules_that_others_have_flushed_are_loaded_again(cluster: Cluster, outside: Host) -> None:
    cluster.head.ssh("nft delete table inet llm_ray")
    assert _open_ports(outside, cluster.head, "[22, 8000]") == [22, 8000]
    assert cluster.play("site.yml", "--tags", "firewall").changed > 0
    assert _open_ports(outside, cluster.head, "[22, 8000]") == [22]


def test_clients_of_the_storage_reach_nfs_and_no_more(cluster: Cluster, outside: Host) -> None:
    served = replace(cluster, groups={**cluster.groups, "nfs_server": ["head"]})
    cluster.head.ssh("systemd-run --unit=served-2049 python3 -m http.server 2049")
    firewall = (
        "--tags",
        "firewall",
        "--skip-tags",
        "preflight",
    )  # which wants no server where the storage is there, as in the lab
    try:
        served.play("site.yml", *firewall)
        assert _open_ports(outside, cluster.head, "[22, 2049, 6380, 8000]") == [22]
        served.play("site.yml", *firewall, "-e", json.dumps({"nfs_server_clients": [f"{outside.address}/32"]}))
        assert _open_ports(outside, cluster.head, "[22, 2049, 6380, 8000]") == [22, 2049]
    finally:
        cluster.head.ssh("systemctl stop served-2049")
        cluster.play("site.yml", "--tags", "firewall")


def test_ssh_is_never_locked_out(cluster: Cluster, outside: Host) -> None:
    """Not even by an inventory that closes every port, also to the host that Ansible runs on."""
    closed = {"firewall_cluster_ports": ["1-65535"], "firewall_served_ports": ["22"], "firewall_cluster": ["192.0.2.1"]}
    cluster.play("site.yml", "--tags", "firewall", "-e", json.dumps(closed))
    try:
        assert _open_ports(outside, cluster.head, "[22, 7860, 8000]") == [22]
    finally:
        cluster.play("site.yml", "--tags", "firewall")
    assert _open_ports(cluster.workers[0], cluster.head, "[22, 7860, 8000]") == [22, 7860, 8000]
