"""Finds problems of hosts, from their facts and the results of the module preflight_probe.

{{ probes | preflight_hosts }} returns a list of problems with the keys host, variable, value and fix.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The package next to the roles, also if ansible-playbook runs in another environment.
sys.path.append(str(Path(__file__).resolve().parents[3]))
from llm_ray.host import rules

Problem = dict[str, Any]
_GIB = rules.GIB
_SUPPORTED = {"Debian": ["12", "13"], "Ubuntu": ["22.04", "24.04"], "RedHat": ["8", "9"]}


def problem(host: str, variable: str, value: Any, fix: str) -> Problem:
    return {"host": host, "variable": variable, "value": value, "fix": fix}


def preflight_hosts(probes: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Returns the problems of the hosts.

    probes: for each host the result of the module preflight_probe with additions of the role (os, version, family,
    storage, settings: the role's variables without their prefix); an empty one means that the host was not reached.
    """
    problems = []
    for host, probe in probes.items():
        if not probe:
            fix = (
                "not reached: see the error above (ssh to it by hand, check ansible_host and ansible_user; RHEL 8 "
                "needs python3.11 and ansible_python_interpreter: docs/reference/support.md), or leave it out with "
                "--limit"
            )
            problems.append(problem(host, "ansible_host", None, fix))
            continue
        if probe["is_node"]:
            problems += _software(host, probe) + _power(host, probe)
        problems += (
            _system(host, probe)
            + _disk(host, probe)
            + _network(host, probe)
            + _storage(host, probe)
            + _accounts(host, probe)
        )
    reached = {host: probe for host, probe in probes.items() if probe}
    return problems + _together(reached)


def _system(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    family = probe["family"] if probe["family"] == "RedHat" else probe["os"]
    version = probe["version"] if family == "Ubuntu" else probe["version"].split(".")[0]
    if version in _SUPPORTED.get(family, []) or probe["settings"]["allow_other_os"]:
        return []
    fix = "not supported: Debian 12 and 13, Ubuntu 22.04 and 24.04, RHEL or Rocky 8 and 9 are; to try all the same set preflight_allow_other_os"
    return [problem(host, "operating system", f"{probe['os']} {probe['version']}", fix)]


def _software(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    """Checks a node's Python, its own or the image's, and that its CPU supports the packages."""
    problems = []
    python = probe["python"]
    if probe["runtime"] == "bare_metal" and python["version"] and not rules.python_fits(python["version"]):
        fix = (
            f"Ray nodes need Python {rules.PYTHON_WORDS}: name one in python_runtime_python, such as /usr/bin/python3.12 or "
            "uv:3.11.14, or set llm_ray_runtime to docker"
        )
        problems.append(
            problem(host, "python_runtime_python", f"{python['path']} is {_dotted(python['version'])}", fix)
        )
    if probe["runtime"] == "bare_metal" and not python["version"] and not python["installable"]:
        fix = "not there: install a standalone Python at that path (uv python install 3.11), or set llm_ray_runtime to docker"
        problems.append(problem(host, "python_runtime_python", python["path"], fix))
    image = probe["image_python"]
    if probe["runtime"] == "docker" and image and not rules.python_fits([*map(int, image.split("."))]):
        fix = f"the image has Python {image}, and Ray nodes need {rules.PYTHON_WORDS}: take another, such as python:3.11.14-slim-bookworm"
        problems.append(problem(host, "ray_node_image_base", image, fix))
    if missing := rules.missing_flags(probe["flags"], probe["settings"]["cpu_flags"]):
        fix = "the CPU lacks it, and torch and vLLM are built for it: use another host, or change preflight_cpu_flags"
        problems.append(problem(host, "preflight_cpu_flags", missing, fix))
    return problems


def _power(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    """Checks cores and memory of a node."""
    problems, settings = [], probe["settings"]
    if probe["cores"] < settings["min_cores"]:
        fix = f"cores: at least {settings['min_cores']} are needed (preflight_min_cores)"
        problems.append(problem(host, "cores", probe["cores"], fix))
    memory = probe["memory"] / _GIB
    if memory < settings["min_memory_gib"]:
        fix = f"GiB of memory: at least {settings['min_memory_gib']} are needed (preflight_min_memory_gib)"
        problems.append(problem(host, "memory", round(memory, 1), fix))
    store, shm = probe["object_store_gib"], probe["shm"] / _GIB
    fault = rules.store_fault(store, shm, memory)
    if fault == "shm":
        fix = f"larger than /dev/shm ({shm:.1f} GiB): Ray would not start; lower it, or mount /dev/shm larger"
        problems.append(problem(host, "ray_node_object_store_gib", store, fix))
    elif fault == "memory":
        fix = f"leaves too little of {memory:.1f} GiB of memory to everything else: at most {rules.STORE_SHARE * memory:.1f}"
        problems.append(problem(host, "ray_node_object_store_gib", store, fix))
    return problems


def _disk(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    needed = rules.needed_disk(probe["installed"], probe["settings"]["min_disk_gib"])
    fix = "GiB free: at least {} are needed where {} lies: free some space (preflight_min_disk_gib)"
    return [
        problem(host, f"disk of {path}", round(free / _GIB, 1), fix.format(needed, path))
        for path, free in probe["free"].items()
        if free / _GIB < needed
    ]


def _network(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    problems, allowed = [], probe["settings"]["max_clock_skew"]
    if probe["is_node"] and not probe["address"]:
        why = "is computed from a fact that this host lacks" if probe["address_given"] else "no default route"
        fix = f"{why}: set ray_node_address (its address in the cluster's network) in host_vars/{host}.yml"
        problems.append(problem(host, "ray_node_address", None, fix))
    if probe["storage"] == "nfs_server" and not probe["nfs_address"]:
        fix = f"no default route: set nfs_server_address (its address in the cluster's network) in host_vars/{host}.yml"
        problems.append(problem(host, "nfs_server_address", None, fix))
    for port in probe["taken"]:
        fix = f"port {port['port']} is used by {port['by'] or 'another process'}: stop it, or set another port"
        problems.append(problem(host, port["name"], port["port"], fix))
    for target, reason in probe["unreached"].items():
        fix = f"cannot be reached from {host} ({reason}): check routes, firewalls and ray_node_address"
        problems.append(problem(host, "address of the head or the NFS server", target, fix))
    skew = rules.clock_skew(probe["started"], probe["now"], probe["finished"])
    if skew > allowed:
        fix = (
            f"seconds off this machine's clock, {allowed} are allowed: set the clocks by NTP (preflight_max_clock_skew)"
        )
        problems.append(problem(host, "clock", round(skew, 1), fix))
    return problems


def _storage(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    storage, home = probe["storage"], probe["home"]
    if storage == "existing" and not home["directory"]:
        return [
            problem(
                host,
                "llm_ray_home",
                home["path"],
                "existing storage must be mounted there before the cluster is made: mount it",
            )
        ]
    if storage == "nfs_client" and home["entries"] and not home["mounted"]:
        fix = "the folder holds files of this host, which the NFS mount would hide: move them to the server, or choose another path"
        return [problem(host, "llm_ray_home", home["path"], fix)]
    lacks = {"nfs_client": "nfs", "nfs_server": "nfsd"}.get(storage)
    if lacks and lacks not in probe["filesystems"]:
        fix = f"the kernel of this host has no {lacks} (a container?): use a real host, or set llm_ray_storage to existing"
        return [problem(host, "llm_ray_storage", "nfs", fix)]
    return []


def _accounts(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    """Checks for accounts that site.yml did not create, and for ids in use."""
    accounts, wanted = probe["accounts"], probe["wanted"]
    problems = []
    for variable, account in accounts["users"].items():
        own = wanted["homes"][variable]
        person = _within(account["home"], "/home") or account["shell"].rpartition("/")[2] not in ("nologin", "false")
        fix = ""
        if variable == "llm_ray_user" and account["uid"] != wanted["uid"]:
            fix = f"is on the host with the uid {account['uid']}, and not {wanted['uid']} (llm_ray_uid): name a user of the cluster's own"
        elif person and account["home"] != own:
            what = f"{account['home']}, {account['shell']}"
            fix = f"is on the host as somebody's account ({what}), which would be locked and, by reset.yml, deleted: name another"
        if fix:
            problems.append(problem(host, variable, account["name"], fix))
    user, group = wanted["user"], accounts["group"]
    if accounts["uid_of"] not in ("", user):
        fix = f"is the uid of {accounts['uid_of']} there: choose one that is free on every host"
        problems.append(problem(host, "llm_ray_uid", wanted["uid"], fix))
    if group is not None and group != wanted["gid"]:
        fix = f"the group {user} is on the host with the gid {group}: choose another llm_ray_user, or take that group away"
        problems.append(problem(host, "llm_ray_gid", wanted["gid"], fix))
    if accounts["gid_of"] not in ("", user):
        fix = f"is the gid of {accounts['gid_of']} there: choose one that is free on every host"
        problems.append(problem(host, "llm_ray_gid", wanted["gid"], fix))
    for folder, name in accounts["homes"].items():
        fix = f"the home of {name} is there, and reset.yml would delete it: name a folder of the cluster's own"
        problems.append(problem(host, wanted["folders"][folder], folder, fix))
    return problems


def _together(probes: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Checks across all hosts."""
    problems = []
    for key, what, fix in (
        (
            "machine_id",
            "/etc/machine-id",
            "is the same as on {}: a cloned image; rm /etc/machine-id, systemd-machine-id-setup, reboot",
        ),
        ("hostname", "host name", "is the same as on {}: hostnamectl hostname NAME"),
    ):
        seen: dict[str, str] = {}
        for host, probe in probes.items():
            if probe[key] in seen:
                problems.append(problem(host, what, probe[key], fix.format(seen[probe[key]])))
            elif probe[key]:
                seen[probe[key]] = host
    nodes = {host: probe for host, probe in probes.items() if probe["is_node"]}
    versions = {
        host: _dotted(p["python"]["version"])
        for host, p in nodes.items()
        if p["runtime"] == "bare_metal" and rules.python_fits(p["python"]["version"])
    }
    homes = {
        host: str(p["home"]["inode"])
        for host, p in nodes.items()
        if p["storage"] == "existing" and p["home"]["directory"]
    }
    for found, variable, fix in (
        (
            versions,
            "python_runtime_python",
            "Ray wants the same patch level on every host, and elsewhere it is {}: install that one",
        ),
        (
            homes,
            "llm_ray_home",
            "not the folder that other hosts have there: mount the same shared file system on every host",
        ),
    ):
        if len(set(found.values())) > 1:
            common = Counter(found.values()).most_common(1)[0][0]
            shown = {host: value if found is versions else nodes[host]["home"]["path"] for host, value in found.items()}
            problems += [
                problem(host, variable, shown[host], fix.format(common))
                for host, value in found.items()
                if value != common
            ]
    problems += _dropped(probes, nodes)
    images = {
        host: probe["image_python"]
        for host, probe in nodes.items()
        if probe["runtime"] == "docker" and probe["image_python"]
    }
    bare = sorted(set(versions.values()))
    fix = "the image has this Python, and hosts without Docker have {}: choose an image with that one, or one runtime for all hosts"
    problems += [
        problem(host, "ray_node_image_base", version, fix.format(bare[0]))
        for host, version in images.items()
        if bare and version != bare[0]
    ]
    return problems


def _dropped(probes: Mapping[str, Mapping[str, Any]], nodes: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Checks for hosts whose own ufw drops packets of other nodes, which it does even if the bundle's rules accept
    them."""
    problems = []
    for host, probe in probes.items():
        if probe["ufw"] is None or probe["firewall"] == "none":  # with none, the user may close the ports with ufw
            continue
        let_in = [ipaddress.ip_network(source, strict=False) for source in probe["ufw"]]
        others = [
            node["address"] for name, node in nodes.items() if name != host and re.fullmatch("[0-9.]+", node["address"])
        ]
        dropped = [
            address for address in others if not any(ipaddress.ip_address(address) in network for network in let_in)
        ]
        if dropped:
            fix = (
                "ufw is active and drops what these nodes send: ufw allow from ADDRESS for each of them, or ufw "
                "disable: the bundle's firewall closes the cluster's ports itself (firewall_provider)"
            )
            problems.append(problem(host, "ufw", dropped, fix))
    return problems


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _within(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"preflight_hosts": preflight_hosts}
