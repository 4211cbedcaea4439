"""What preflight finds on hosts: each message once; and what the probe reads on this machine."""

from __future__ import annotations

import grp
import os
import pwd
import socket
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from llm_ray.host import facts, rules

_GIB = rules.GIB
_SETTINGS = {
    "cpu_flags": ["avx2"],
    "min_cores": 2,
    "min_memory_gib": 4,
    "min_disk_gib": 10,
    "max_clock_skew": 5,
    "allow_other_os": False,
}


_SERVER = {"is_node": False, "storage": "nfs_server"}
_OURS = {"name": "ray", "uid": 1200, "home": "/var/lib/llm-ray", "shell": "/usr/sbin/nologin"}  # as site.yml makes it
_WATCHER = {"name": "llm-ray-monitoring", "uid": 998, "home": "/nonexistent", "shell": "/usr/sbin/nologin"}
_NOBODY: dict[str, Any] = {"users": {}, "uid_of": "", "gid_of": "", "group": None, "homes": {}}
_MADE = {
    "users": {"llm_ray_user": _OURS, "monitoring_user": _WATCHER},
    "uid_of": "ray",
    "gid_of": "ray",
    "group": 1200,
    "homes": {},
}


def _account(changed: dict[str, Any]) -> dict[str, Any]:
    return {"accounts": _MADE | {"users": {"llm_ray_user": _OURS | changed}}}


def _probe(n: int, **changed: Any) -> dict[str, Any]:
    """What a fit host answers."""
    return {
        "now": 1000.0, "started": 999.0, "finished": 1001.0, "flags": ["sse", "avx2"], "cores": 16, "memory": 64 * _GIB, "shm": 32 * _GIB,
        "free": {"/opt/llm-ray": 50 * _GIB}, "taken": [], "unreached": {}, "machine_id": f"id{n}", "hostname": f"h{n}", "filesystems": ["nfs", "nfsd"],
        "home": {"path": "/srv/llm-ray", "directory": True, "mounted": False, "entries": 0, "inode": 7},
        "python": {"path": "/usr/bin/python3", "version": [3, 11, 2], "installable": True},
        "os": "Debian", "version": "12.8", "family": "Debian", "runtime": "bare_metal", "object_store_gib": 2.0, "is_node": True,
        "storage": "local", "installed": False, "image_python": "", "accounts": _NOBODY,
        "address": f"10.0.0.{n}", "address_given": False, "nfs_address": f"10.0.0.{n}", "ufw": None, "firewall": "", "settings": _SETTINGS,
        "wanted": {
            "user": "ray", "uid": 1200, "gid": 1200, "homes": {"llm_ray_user": "/var/lib/llm-ray", "monitoring_user": "/nonexistent"},
            "folders": {"/opt/llm-ray": "llm_ray_prefix", "/var/lib/llm-ray": "llm_ray_state"},
        },
    } | changed  # fmt: skip


def _lines(preflight: SimpleNamespace, *changes: dict[str, Any]) -> list[str]:
    probes = {f"h{n}": _probe(n, **change) for n, change in enumerate(changes)}
    return preflight.preflight_list(preflight.preflight_hosts(probes), [*probes]).splitlines()


def test_fit_hosts_have_no_problems(preflight: SimpleNamespace) -> None:
    rocky = {
        "os": "Rocky",
        "version": "9.4",
        "family": "RedHat",
        "python": {"path": "python3.11", "version": [], "installable": True},
    }
    ubuntu = {
        "os": "Ubuntu",
        "version": "24.04",
        "family": "Debian",
        "python": {"path": "python3", "version": [3, 11, 2], "installable": True},
    }
    assert _lines(preflight, {}, rocky, ubuntu, {"accounts": _MADE}) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"os": "Debian", "version": "11.9"}, "h0: operating system = \"Debian 11.9\": not supported: Debian 12 "
            "and 13, Ubuntu 22.04 and 24.04"),
        ({"os": "SLES", "version": "15.5", "family": "Suse"}, "h0: operating system = \"SLES 15.5\": not supported"),
        ({"python": {"path": "/usr/bin/python3", "version": [3, 10, 12], "installable": True}}, "h0: python_runtime_python = \"/usr/bin/python3 is 3.10.12\": Ray nodes need Python 3.11, 3.12 or 3.13"),
        ({"python": {"path": "/usr/bin/python3", "version": [3, 14, 1], "installable": True}}, "h0: python_runtime_python = \"/usr/bin/python3 is 3.14.1\": Ray nodes need Python 3.11, 3.12 or 3.13: name one in python_runtime_python, such as /usr/bin/python3.12 or uv:3.11.14, or set"),
        (_account({"uid": 1000}), "h0: llm_ray_user = \"ray\": is on the host with the uid 1000, and not 1200 "
            "(llm_ray_uid): name a user"),
        (_account({"home": "/home/ray", "shell": "/bin/bash"}), "h0: llm_ray_user = \"ray\": is on the host as "
            "somebody's account (/home/ray, /bin/bash), which would be locked"),
        (_account({"home": "/home/ray"}), "h0: llm_ray_user = \"ray\": is on the host as somebody's account "
            "(/home/ray, /usr/sbin/nologin)"),
        ({"accounts": _MADE | {"users": {"monitoring_user": _WATCHER | {"name": "alice", "home": "/home/alice", "shell": "/bin/sh"}}}}, "h0: monitoring_user = \"alice\": is on the host as somebody's account (/home/alice, /bin/sh)"),
        ({"accounts": _NOBODY | {"uid_of": "alice"}}, "h0: llm_ray_uid = 1200: is the uid of alice there: choose one "
            "that is free"),
        ({"accounts": _NOBODY | {"gid_of": "staff"}}, "h0: llm_ray_gid = 1200: is the gid of staff there: choose one "
            "that is free"),
        ({"accounts": _NOBODY | {"group": 1000}}, "h0: llm_ray_gid = 1200: the group ray is on the host with the gid "
            "1000: choose another llm_ray_user"),
        ({"accounts": _NOBODY | {"homes": {"/opt/llm-ray": "bob"}}}, "h0: llm_ray_prefix = \"/opt/llm-ray\": the home "
            "of bob is there, and reset.yml would delete it"),
        ({"python": {"path": "/opt/python3.11/bin/python3", "version": [], "installable": False}}, "h0: python_runtime_python = \"/opt/python3.11/bin/python3\": not there: install"),
        ({"flags": ["sse"]}, "h0: preflight_cpu_flags = [\"avx2\"]: the CPU lacks it"),
        ({"cores": 1}, "h0: cores = 1: cores: at least 2 are needed (preflight_min_cores)"),
        ({"memory": 3 * _GIB}, "h0: memory = 3.0: GiB of memory: at least 4 are needed (preflight_min_memory_gib)"),
        ({"free": {"/opt/llm-ray": 5 * _GIB}}, "h0: disk of /opt/llm-ray = 5.0: GiB free: at least 10 are needed where "
            "/opt/llm-ray lies"),
        ({"free": {"/opt/llm-ray": _GIB // 2}, "installed": True}, "h0: disk of /opt/llm-ray = 0.5: GiB free: at least "
            "1 are needed"),
        ({"object_store_gib": 40.0}, "h0: ray_node_object_store_gib = 40.0: larger than /dev/shm (32.0 GiB)"),
        ({"object_store_gib": 60.0, "shm": 64 * _GIB}, "h0: ray_node_object_store_gib = 60.0: leaves too little of "
            "64.0 GiB"),
        ({"taken": [{"name": "ray_node_port", "port": 6379, "by": "redis (process 9)"}]}, "h0: ray_node_port = 6379: "
            "port 6379 is used by redis (process 9)"),
        ({"unreached": {"10.0.0.1": "timed out"}}, "h0: address of the head or the NFS server = \"10.0.0.1\": cannot "
            "be reached from h0 (timed out)"),
        ({"address": ""}, "h0: ray_node_address: no default route: set ray_node_address (its address in the cluster's "
            "network) in host_vars/h0.yml"),
        ({"address": "", "address_given": True}, "h0: ray_node_address: is computed from a fact that this host lacks: "
            "set ray_node_address"),
        (_SERVER | {"address": "", "nfs_address": ""}, "h0: nfs_server_address: no default route: set "
            "nfs_server_address (its address in"),
        (_SERVER | {"free": {"/srv/llm-ray": _GIB}}, "h0: disk of /srv/llm-ray = 1.0: GiB free: at least 10 are needed"),
        (_SERVER | {"version": "11.9"}, "h0: operating system = \"Debian 11.9\": not supported"),
        ({"ufw": ["10.1.0.0/16"]}, "h0: ufw = [\"10.0.0.1\"]: ufw is active and drops what these nodes send: ufw allow "
            "from ADDRESS for each of them, or ufw"),
        ({"cores": 4, "settings": _SETTINGS | {"min_cores": 8}}, "h0: cores = 4: cores: at least 8 are needed"),
        ({"now": 900.0}, "h0: clock = 99.0: seconds off this machine's clock, 5 are allowed"),
        ({"now": 1101.0}, "h0: clock = 100.0: seconds off this machine's clock"),
        ({"storage": "existing", "home": {"path": "/mnt/x", "directory": False, "mounted": False, "entries": 0, "inode": 0}}, "h0: llm_ray_home = \"/mnt/x\": existing storage must be mounted"),
        ({"storage": "nfs_client", "home": {"path": "/mnt/x", "directory": True, "mounted": False, "entries": 3, "inode": 1}}, "h0: llm_ray_home = \"/mnt/x\": the folder holds files of this"),
        ({"storage": "nfs_client", "filesystems": ["nfsd"]}, "h0: llm_ray_storage = \"nfs\": the kernel of this host "
            "has no nfs (a container?)"),
        ({"storage": "nfs_server", "filesystems": ["nfs"]}, "h0: llm_ray_storage = \"nfs\": the kernel of this host "
            "has no nfsd"),
    ],
)  # fmt: skip
def test_one_host(preflight: SimpleNamespace, changed: dict[str, Any], line: str) -> None:
    (found,) = _lines(preflight, changed, {})
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"machine_id": "id0"}, "h2: /etc/machine-id = \"id0\": is the same as on h0: a cloned image"),
        ({"hostname": "h1"}, "h2: host name = \"h1\": is the same as on h1: hostnamectl hostname NAME"),
        ({"python": {"path": "p", "version": [3, 11, 4], "installable": True}}, "h2: python_runtime_python = "
            "\"3.11.4\": Ray wants the same patch level on every host, and elsewhere it is 3.11.2"),
    ],
)  # fmt: skip
def test_hosts_together(preflight: SimpleNamespace, changed: dict[str, Any], line: str) -> None:
    (found,) = _lines(preflight, {}, {}, changed)
    assert found.startswith(line)


def test_a_storage_host_is_no_node(preflight: SimpleNamespace) -> None:
    weak = {
        "flags": [],
        "cores": 1,
        "memory": _GIB,
        "python": {"path": "/usr/bin/python3", "version": [3, 10, 1], "installable": False},
    }
    assert _lines(preflight, {}, _SERVER | weak | {"address": ""}) == []


def test_a_ufw_that_lets_nodes_in_or_is_the_users_own(preflight: SimpleNamespace) -> None:
    assert _lines(preflight, {"ufw": ["10.0.0.1", "192.168.0.0/16"]}, {"ufw": ["10.0.0.0/24"]}, _SERVER) == []
    assert _lines(preflight, {"ufw": [], "firewall": "none"}, {}) == []
    assert _lines(preflight, {"ufw": []}) == []
    (found,) = _lines(preflight, {"ufw": ["10.0.0.1"]}, {}, {})
    assert found.startswith('h0: ufw = ["10.0.0.2"]')


def test_one_host_with_another_runtime_has_the_others_python(preflight: SimpleNamespace) -> None:
    docker = {
        "runtime": "docker",
        "image_python": "3.11.14",
        "python": {"path": "", "version": [], "installable": False},
    }
    assert _lines(preflight, docker, docker) == []
    assert _lines(preflight, {}, docker | {"image_python": "3.11.2"}) == []
    assert _lines(preflight, {}, docker | {"image_python": ""}) == []  # an image of one's own is not known
    (found,) = _lines(preflight, docker | {"image_python": "3.14.1"})
    assert found.startswith(
        'h0: ray_node_image_base = "3.14.1": the image has Python 3.14.1, and Ray nodes need 3.11, 3.12 or 3.13'
    )
    (found,) = _lines(preflight, {}, docker)
    assert found.startswith(
        'h1: ray_node_image_base = "3.11.14": the image has this Python, and hosts without Docker have 3.11.2: choose'
    )


def test_five_hosts_are_judged_one_by_one_and_told_together(preflight: SimpleNamespace) -> None:
    assert _lines(preflight, {}, {}, {}, {}, {}) == []
    found = _lines(preflight, {}, {"cores": 1}, {"cores": 1}, {"memory": 3 * _GIB}, {})
    assert [line.partition(":")[0] for line in found] == ["h1, h2", "h3"]
    assert _lines(preflight, *[{"cores": 1}] * 5) == [
        "all: cores = 1: cores: at least 2 are needed (preflight_min_cores)"
    ]


def test_shared_storage_that_is_not_shared(preflight: SimpleNamespace) -> None:
    shared = {"storage": "existing"}
    other = shared | {"home": {"path": "/srv/llm-ray", "directory": True, "mounted": True, "entries": 0, "inode": 8}}
    assert _lines(preflight, shared, shared) == []
    (found,) = _lines(preflight, shared, shared, other)
    assert found.startswith(
        'h2: llm_ray_home = "/srv/llm-ray": not the folder that other hosts have there: mount the same'
    )


def test_a_host_that_was_not_reached_and_a_problem_of_all(preflight: SimpleNamespace) -> None:
    probes = {"h0": _probe(0, cores=1), "h1": {}, "h2": _probe(2, cores=1)}
    lines = preflight.preflight_list(preflight.preflight_hosts(probes), [*probes]).splitlines()
    assert [line.split(":")[0] for line in lines] == ["h0, h2", "h1"]
    assert "not reached" in lines[1]
    assert "RHEL 8 needs python3.11 and ansible_python_interpreter" in lines[1]


def test_a_port_of_another_is_taken_and_ones_own_is_not(probe: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = probe.taken({"ray_node_port": port, "range": f"{port}-{port}"}, {os.getuid() + 1})[:1]
        assert found["name"] == "ray_node_port"
        assert found["port"] == port
        assert f"process {os.getpid()}" in found["by"]
        assert probe.taken({"ray_node_port": port}, {os.getuid()}) == []
        assert probe.unreached("127.0.0.1", port) == ""
    assert probe.unreached("127.0.0.1", port) == ""  # refused: it answers
    assert "resolution" in probe.unreached("no-such-host.invalid", port) or "known" in probe.unreached(
        "no-such-host.invalid", port
    )


def test_what_ufw_lets_in(probe: ModuleType) -> None:
    rules = """Status: active
Logging: on (low)
Default: deny (incoming), allow (outgoing), disabled (routed)
New profiles: skip

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW IN    Anywhere
6379                       ALLOW IN    10.0.0.9
Anywhere                   ALLOW IN    10.0.0.2
Anywhere/tcp               ALLOW IN    10.0.1.0/24/tcp            # cluster
192.168.1.5                ALLOW IN    10.0.0.3 (log)
Anywhere                   ALLOW IN    10.0.0.4 1024/tcp
Anywhere                   DENY IN     10.0.0.5
Anywhere                   ALLOW OUT   10.0.0.6
6379:20000/tcp             ALLOW IN    10.0.0.7
10.0.0.1 80,6380/tcp       ALLOW IN    10.0.0.8
2049                       ALLOW IN    10.0.2.0/24
22/tcp (v6)                ALLOW IN    Anywhere (v6)
"""
    everywhere = ["10.0.0.2", "10.0.1.0/24", "10.0.0.3"]
    assert probe.let_in(rules, 6380) == [*everywhere, "10.0.0.7", "10.0.0.8"]
    assert probe.let_in(rules, 2049) == [*everywhere, "10.0.2.0/24"]
    assert probe.let_in(rules, 22) == ["0.0.0.0/0", *everywhere]
    assert probe.let_in(rules + "Anywhere on eth1           ALLOW IN    Anywhere\n", 6380)[-1] == "0.0.0.0/0"
    assert probe.let_in(rules.replace("deny (incoming)", "allow (incoming)"), 6380)[-1] == "0.0.0.0/0"
    assert probe.let_in("Status: inactive\n", 6380) is None


def test_what_the_probe_reads(probe: ModuleType, tmp_path: Path) -> None:
    assert probe.cpu_flags("processor: 0\nflags\t\t: fpu avx2 amx_tile\n") == ["fpu", "avx2", "amx_tile"]
    assert facts.existing(str(tmp_path / "a/b")) == tmp_path
    assert probe.interpreter(["/no/such/python", "python3"])["version"][0] == 3
    assert probe.interpreter(["/no/such/python"]) == {"path": "/no/such/python", "version": []}
    (tmp_path / "file").write_text("x")
    assert probe.folder(str(tmp_path))["entries"] == 1
    assert not probe.folder(str(tmp_path / "none"))["directory"]


def test_accounts_of_this_machine(probe: ModuleType) -> None:
    me = pwd.getpwuid(0)
    found = probe.accounts({"llm_ray_user": me.pw_name, "monitoring_user": "no-such-user"}, 0, 0, [])
    assert found["users"] == {"llm_ray_user": {"name": me.pw_name, "uid": 0, "home": me.pw_dir, "shell": me.pw_shell}}
    assert (found["uid_of"], found["gid_of"], found["group"]) == (me.pw_name, grp.getgrgid(0).gr_name, 0)
    none = probe.accounts({"llm_ray_user": "no-such-user"}, 59998, 59998, [])
    assert none == {"users": {}, "uid_of": "", "gid_of": "", "group": None, "homes": {}}


def test_homes_of_others_in_folders_of_the_cluster(probe: ModuleType) -> None:
    text = "ray:x:1200:1200::/var/lib/llm-ray:/usr/sbin/nologin\nbob:x:1000:1000::/data/ray/bob:/bin/sh\nodd\n"
    assert probe.homes(text, ["/data/ray", "/var/lib/llm-ray", "/data/ray/bo"], ["ray"]) == {"/data/ray": "bob"}


def test_the_roles_defaults_are_the_rules_that_doctor_has(roles: str) -> None:
    defaults = yaml.safe_load(Path(roles, "preflight/defaults/main.yml").read_text())
    assert defaults["preflight_cpu_flags"] == [*rules.CPU_FLAGS]
    assert defaults["preflight_min_cores"] == rules.MIN_CORES
    assert defaults["preflight_min_memory_gib"] == rules.MIN_MEMORY_GIB
    assert defaults["preflight_min_disk_gib"] == rules.MIN_DISK_GIB
    assert defaults["preflight_max_clock_skew"] == rules.MAX_CLOCK_SKEW
