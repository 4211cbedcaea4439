"""The storage roles on two virtual machines, which have kernels of their own: `store` serves and is the head, `node`
mounts.

About the only part of the lab that is slow (no KVM): each test adds to what the ones before it made.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import Cluster, copy_bundle
from tests.lab.hosts import Host, lab
from tests.lab.machines import Machine, missing
from tests.waiting import until

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(3000)]

HOME = "/srv/llm-ray"
_TAGS = ("--tags", "host_base,nfs_server,nfs_client")
# Appends numbered lines, each on the server's disk before the next; what was acknowledged is counted on the local disk.
_WRITER = f"""
import os
line = 0
with open("{HOME}/runs/lines", "w") as file, open("/var/tmp/acknowledged", "w") as count:
    while True:
        print(line, file=file, flush=True)
        os.fsync(file.fileno())
        line += 1
        os.pwrite(count.fileno(), str(line).encode(), 0)
"""
_REMOVE = """
- hosts: ray_workers
  become: true
  gather_facts: false
  tasks: [{ansible.builtin.include_role: {name: nfs_client, tasks_from: remove}}]
- hosts: nfs_server
  become: true
  gather_facts: false
  tasks: [{ansible.builtin.include_role: {name: nfs_server, tasks_from: remove}}]
"""


@pytest.fixture(scope="module")
def machines(lab_ready: None) -> Iterator[Cluster]:
    if reason := missing():
        pytest.exit(reason, 3)
    folder = Path(tempfile.mkdtemp(prefix="llm-ray-lab-"))
    began = time.monotonic()
    with lab(folder) as made:
        copy_bundle(folder / "bundle")
        (folder / "bundle/remove.yml").write_text(_REMOVE)
        made.add("store", "node", kind=Machine)
        print(f"two machines have booted after {time.monotonic() - began:.0f} s")
        groups = {"ray_head": ["store"], "ray_workers": ["node"], "nfs_server": ["store"]}
        yield Cluster(made, folder / "bundle", groups, {"ansible_ssh_timeout": 60})
    print(f"all with the machines took {time.monotonic() - began:.0f} s")


@pytest.fixture(scope="module")
def store(machines: Cluster) -> Host:
    return machines.hosts["store"]


@pytest.fixture(scope="module")
def node(machines: Cluster) -> Host:
    return machines.hosts["node"]


def _ray(host: Host, command: str, check: bool = True) -> str:
    """Run it as the user of the cluster."""
    return host.ssh(f"runuser -u ray -- sh -c '{command}'", check=check, timeout=300).stdout.strip()


def test_check_mode_on_bare_machines_then_twice(machines: Cluster, store: Host, node: Host) -> None:
    machines.play("site.yml", "--check", "--diff", *_TAGS)
    assert (
        node.ssh(
            "ls -d /srv/llm-ray /etc/llm-ray /etc/systemd/system/rpcbind.socket.d 2>&1 | grep -v cannot", check=False
        ).stdout
        == ""
    )
    machines.play("site.yml", *_TAGS)
    second = machines.play("site.yml", *_TAGS)
    assert second.changed == 0, second.changes()


def test_it_is_mounted_as_it_should_be(store: Host, node: Host) -> None:
    _ray(node, f"ls {HOME}")
    kind, options = node.ssh(f"findmnt -n -t nfs4 -o FSTYPE,OPTIONS {HOME}").stdout.split()
    assert kind == "nfs4"
    assert {"vers=4.2", "hard", "noatime", "nconnect=8", "nosuid", "nodev"} <= set(options.split(","))
    exported = store.ssh("exportfs -s").stdout.split()
    assert exported[0] == HOME
    assert exported[1].startswith(f"{node.address}(")
    assert {"sync", "rw", "root_squash"} <= set(exported[1].partition("(")[2].rstrip(")").split(","))
    for folder in ("models", "data", "runs", "serve"):
        mode = 700 if folder == "serve" else 770  # the endpoint's keys are in it
        assert node.ssh(f"stat -c '%U:%G %a' {HOME}/{folder}").stdout.strip() == f"ray:ray {mode}"


def test_only_ssh_and_nfs_listen(store: Host, node: Host) -> None:
    """No port mapper, no mountd: what NFSv4 does not need is not there."""
    ports = "ss -Hltun | awk '{print $5}' | grep -v -e 127.0.0 -e '\\[::1\\]' | sed 's/.*://' | sort -nu"
    assert store.ssh(ports).stdout.split() == ["22", "2049"]
    assert node.ssh(ports).stdout.split() == ["22"]


def test_kernel_and_clock_are_as_host_base_sets_them(store: Host, node: Host) -> None:
    """Here, since a container has the clock and the kernel of its machine."""
    for host in (store, node):
        assert "[madvise]" in host.ssh("cat /sys/kernel/mm/transparent_hugepage/enabled").stdout
        assert host.ssh("sysctl -n vm.swappiness vm.max_map_count").stdout.split() == ["10", "262144"]
        assert host.ssh("systemctl is-active chrony; systemctl is-enabled chrony").stdout.split() == [
            "active",
            "enabled",
        ]
        assert _ray(host, 'bash -c "ulimit -u"').isdigit()


def test_what_one_writes_all_read(store: Host, node: Host) -> None:
    for host in (store, node):
        _ray(host, f"echo {host.name} > {HOME}/data/{host.name}")
    for host in (store, node):
        assert _ray(host, f"cat {HOME}/data/store {HOME}/data/node").split() == ["store", "node"]


def test_root_of_a_client_is_nobody(node: Host) -> None:
    for command in (
        f"cat {HOME}/data/store",
        f"touch {HOME}/data/by-root",
        f"touch {HOME}/by-root",
        f"chown root {HOME}/data/node",
    ):
        assert node.ssh(command, check=False).returncode != 0, command


def test_an_address_outside_the_cluster_is_refused(store: Host, node: Host) -> None:
    unit = r"srv-llm\\x2dray"
    node.ssh(f"systemctl stop {unit}.automount {unit}.mount")
    mount = f"mkdir -p /mnt/other && timeout 60 mount -t nfs4 -o vers=4.2,retry=0 {store.address}:{HOME} /mnt/other"
    outside = f"{node.net.prefix}.99"
    node.ssh(f"ip addr add {outside}/24 dev eth0 && ip route add {store.address}/32 dev eth0 src {outside}")
    try:
        done = node.ssh(mount, check=False)
        assert done.returncode == 32, done
        assert any(reason in done.stderr for reason in ("access denied", "not permitted", "No such file")), done.stderr
    finally:
        node.ssh(f"ip route del {store.address}/32 dev eth0 && ip addr del {outside}/24 dev eth0")
    node.ssh(mount + " && umount /mnt/other")  # from its own address it may
    node.ssh(f"systemctl start {unit}.automount")


def test_nothing_is_lost_when_the_server_goes_away_under_a_writer(store: Host, node: Host) -> None:
    """Once it reboots in order, once its power is cut; the writer waits, and goes on."""

    def acknowledged() -> int:
        return int(node.ssh("cat /var/tmp/acknowledged").stdout or 0)

    def goes_on(before: int) -> bool:
        return acknowledged() > before + 20

    node.ssh(f"cat > /var/tmp/writer.py <<'END'{_WRITER}END")
    node.ssh(f"touch /var/tmp/acknowledged; chown ray /var/tmp/acknowledged; ls {HOME}")
    node.ssh("systemd-run --unit=writer --uid=ray python3 /var/tmp/writer.py")
    until(lambda: goes_on(0), "the writer begins")
    store.reboot()
    before = acknowledged()
    until(lambda: goes_on(before), "the writer goes on after the server's reboot")
    store.kill()
    before = acknowledged()
    store.boot()
    until(lambda: goes_on(before), "the writer goes on after the server's power cut")
    assert node.ssh("systemctl is-active writer").stdout.strip() == "active"
    node.ssh("systemctl stop writer")
    lines = [int(line) for line in _ray(store, f"cat {HOME}/runs/lines").split()]
    assert len(lines) >= acknowledged() > before
    assert lines == list(range(len(lines)))


def test_a_client_mounts_it_again_at_the_first_access_after_its_reboot(node: Host) -> None:
    node.reboot()
    assert "[madvise]" in node.ssh("cat /sys/kernel/mm/transparent_hugepage/enabled").stdout
    assert node.ssh(f"findmnt -n -t nfs4 {HOME}", check=False).stdout == ""
    assert _ray(node, f"cat {HOME}/data/store") == "store"
    assert node.ssh(f"findmnt -n -t nfs4 {HOME}").stdout


def test_removed_it_leaves_the_data_and_nothing_else(machines: Cluster, store: Host, node: Host) -> None:
    machines.play("remove.yml")
    assert machines.play("remove.yml").changed == 0
    assert node.ssh("findmnt -n -t nfs4,autofs", check=False).stdout.split("\n")[0].find(HOME) == -1
    left = "ls -d /srv/llm-ray /etc/exports.d/llm-ray* /etc/nfs.conf.d/llm-ray* /etc/systemd/system/srv-llm* /etc/systemd/system/rpcbind*"
    assert node.ssh(f"{left} 2>/dev/null", check=False).stdout == ""
    assert store.ssh(f"{left} 2>/dev/null", check=False).stdout.split() == [HOME]
    assert store.ssh("exportfs -s; ss -Hltn sport = :2049").stdout == ""
    assert store.ssh(f"cat {HOME}/data/node").stdout == "node\n"
