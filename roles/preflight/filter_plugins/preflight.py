"""The judgements of preflight: what is wrong in an inventory, and what is wrong with hosts.

{{ hostvars | preflight_inventory(groups, roles_folder) }}  and  {{ probes | preflight_hosts }}
return a list of problems; each has the keys host, variable, value and fix. An empty list: nothing is wrong.
{{ hostvars | preflight_reach(groups, host, roles_folder) }} returns the addresses that a node has to reach.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.parsing.convert_bool import boolean

Problem = dict[str, Any]
GROUPS = ("ray_head", "ray_workers", "nfs_server")
# What a group of ours may have been called instead.
_GROUP_NAMES = {name: name for name in GROUPS} | {"head": "ray_head", "workers": "ray_workers", "nfs": "nfs_server"}
_GIB = 2**30
# The longest path under llm_ray_state: a socket in Ray's session folder. A socket's path has at most 107 characters.
_SOCKET = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_SOCKET_LIMIT = 107
# Ray refuses an object store that is larger than /dev/shm; so much must stay to everything else.
_STORE_SHARE = 0.8
# Variables of folders by what is in them. What is of two kinds lies apart, since reset.yml deletes all of a kind, or none.
_FOLDERS = {
    "software": ("llm_ray_prefix", "python_runtime_prefix", "ray_node_prefix"),
    "local state": ("llm_ray_state", "host_base_state", "ray_node_state", "ray_job_state"),
    "monitoring's data": ("monitoring_data",),
    "shared storage": ("llm_ray_home", "nfs_client_path", "nfs_server_path", "ray_node_home", "ray_job_home"),
    "spilled objects": ("ray_node_spill",),
}
_DELETED = ("software", "local state", "monitoring's data")
# Folders in which others have theirs, and those in which nothing of the cluster has a place.
_SHARED = (
    "/home", "/media", "/mnt", "/opt", "/snap", "/srv", "/tmp", "/usr/local", "/usr/share", "/var/cache",  # noqa: S108
    "/var/lib", "/var/local", "/var/log", "/var/opt", "/var/spool", "/var/tmp", "/var/www",  # noqa: S108
)  # fmt: skip
_SYSTEM = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/lost+found", "/proc", "/root", "/run", "/sbin", "/sys",
    "/usr/bin", "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/local/bin", "/usr/sbin", "/usr/src",
    "/var/backups", "/var/lib/apt", "/var/lib/containerd", "/var/lib/dpkg", "/var/lib/docker", "/var/lib/nfs", "/var/lib/rpm",
    "/var/lib/systemd", "/var/lock", "/var/mail", "/var/run",
)  # fmt: skip
_USERS = ("llm_ray_user", "host_base_user", "nfs_client_user", "ray_job_user", "ray_node_user", "monitoring_user")
_SHAPES: dict[str, tuple[type, str]] = {"list": (list, "[{}]"), "dict": (dict, "{{{}}}")}
_TYPED = ("bundle_model",)  # a list that its role takes as a,b too
# Names that a task alone knows, beside the roles' own.
_LATER = {"ansible_facts", "ansible_host", "ansible_play_batch", "ansible_play_hosts", "ansible_play_hosts_all", "ansible_user", "hostvars"}


def problem(host: str, variable: str, value: Any, fix: str) -> Problem:
    return {"host": host, "variable": variable, "value": value, "fix": fix}


# The inventory


def specs(roles: str | Path) -> dict[str, dict[str, Any]]:
    """Every variable that a user may set, with its argument spec and its role, from meta/argument_specs.yml of all roles."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(roles).glob("*/meta/argument_specs.yml")):
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            found |= {name: spec | {"role": path.parent.parent.name} for name, spec in (entry.get("options") or {}).items()}
    return found


def preflight_inventory(hostvars: Any, groups: Mapping[str, Sequence[str]], roles: str) -> list[Problem]:
    """What is wrong in the inventory, without asking any host.

    hostvars: Ansible's. groups: Ansible's. roles: the folder of the roles, whose argument_specs know the variables.
    """
    known = specs(roles)
    owners = [path.parent.parent.name for path in Path(roles).glob("*/meta/argument_specs.yml")]
    hosts = sorted({host for group in GROUPS for host in groups.get(group, [])})
    variables = {host: _variables(hostvars, host) for host in hosts}
    values = {host: _Values(hostvars[host], known, _raw(hostvars, host)) for host in hosts}
    problems = group_problems(groups, {host: values[host].get for host in hosts})
    for host in hosts:
        problems += name_problems(host, variables[host], known, owners)
        problems += type_problems(host, {name: values[host].templated(name) for name in variables[host] if name in known}, known)
        problems += value_problems(host, values[host].get)
        problems += folder_problems(host, values[host].get) + user_problems(host, values[host].get)
    problems += same_problems(values, known) + address_problems(values) + node_address_problems(values)
    return _merged(problems + runtime_problems(groups, values), hosts)


def preflight_values(variables: Mapping[str, Any], roles: str) -> dict[str, Any]:
    """A host's values of all variables that roles know, but secrets: the inventory's, else the default in the role's argument_specs."""
    known = specs(roles)
    values = _Values(variables, known)
    names = [name for name, spec in known.items() if not spec.get("no_log")]
    found = {name: value for name in names if (value := values.default(name)) is not None}
    return found | {name: value for name in names if (value := values.get(name)) is not None}


def preflight_reach(hostvars: Any, groups: Mapping[str, Sequence[str]], host: str, roles: str) -> list[str]:
    """Where a node finds the head and the NFS server: the addresses that are set, else those of the facts."""
    known = specs(roles)
    own = _Values(hostvars[host], known)
    found = []
    for group, here, there in (
        ("ray_head", "ray_node_head_address", "ray_node_address"),
        ("nfs_server", "nfs_client_server", "nfs_server_address"),
    ):
        for other in groups.get(group, []):
            fact = ((hostvars[other].get("ansible_facts") or {}).get("default_ipv4") or {}).get("address")
            if other != host:
                found.append(own.get(here) or _Values(hostvars[other], known).get(there) or fact)
    return [*dict.fromkeys(map(str, filter(None, found)))]


class _Undecided(Exception):
    """A value that is not to be known yet, or not here."""


class _Values:
    """A host's variables, templated; the spec's default where the inventory does not set one."""

    def __init__(self, variables: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], raw: Mapping[str, Any] | None = None) -> None:
        self.variables, self.known, self.raw = variables, known, raw or {}

    def templated(self, name: str) -> Any:
        """The value of a variable that is set; an exception, returned, where it cannot be worked out."""
        try:
            return _plain(self.variables[name])
        except Exception as error:
            return _Undecided() if _vaulted(error) or self._later(name) else error

    def _later(self, name: str) -> bool:
        """Whether a value is made, be it through other variables, of what only a task knows: facts, other hosts, roles' variables."""
        seen, todo = set[str](), [name]
        while todo:
            words = set(re.findall(r"[A-Za-z_]\w*", repr(self.raw.get(todo.pop())))) - seen
            if any(word in _LATER or word.startswith("__") or self._default_beside(name, word) for word in words):
                return True
            seen |= words
            todo += words & set(self.raw)
        return False

    def _default_beside(self, name: str, other: str) -> bool:
        """Whether the other is there in tasks that use the variable: a default of its own role. Of llm_ray_* no role has one."""
        if other in self.raw or other.startswith("llm_ray_") or not {name, other} <= set(self.known):
            return False
        return bool(self.known[name]["role"] == self.known[other]["role"])

    def decided(self, name: str) -> bool:
        return name not in self.variables or not isinstance(self.templated(name), _Undecided)

    def get(self, name: str) -> Any:
        """The value or the plain default; None where it is not to be known before hosts are asked."""
        if name not in self.variables:
            return self.default(name)
        value = self.templated(name)
        if isinstance(value, str) and value.isdecimal() and self.known.get(name, {}).get("type") == "int":
            return int(value)  # as -e brings it
        return None if isinstance(value, Exception) else value

    def default(self, name: str) -> Any:
        default = self.known.get(name, {}).get("default")
        return None if isinstance(default, str) and "{{" in default else default


def _raw(hostvars: Any, host: str) -> Mapping[str, Any]:
    """A host's variables as they are written."""
    return getattr(hostvars, "raw_get", hostvars.get)(host)


def _vaulted(error: BaseException | None) -> bool:
    """Whether a value lies in a vault whose password is not given: what must be known is no secret."""
    while error:
        if "decrypt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _variables(hostvars: Any, host: str) -> list[str]:
    return [str(name) for name in hostvars[host]]


def _plain(value: Any) -> Any:
    """Lists and dictionaries of Ansible as Python's own."""
    return json.loads(json.dumps(value, default=str))


def group_problems(groups: Mapping[str, Sequence[str]], get: Mapping[str, Callable[[str], Any]]) -> list[Problem]:
    """One head, no host twice, no host left out in a group nearly called as one of ours, storage that fits the groups."""
    heads, workers, servers = ([*groups.get(name, [])] for name in GROUPS)
    problems = []
    for name in sorted(set(groups) - {"all", "ungrouped"}):
        left_out = sorted({*groups[name]} - {*heads, *workers, *servers})
        near = "" if name in GROUPS else _near_group(name, groups)
        if near and (left_out or (near == "ray_head" and not heads)):
            fix = f"the group {name} means nothing here: did you mean {near}?"
            problems.append(problem("all", "group", name, f"{fix} {', '.join(left_out)} would be left out" if left_out else fix))
    if len(heads) != 1:
        problems.append(problem("all", "ray_head", heads, f"the group ray_head must have exactly one host, and has {len(heads)}"))
    for host in sorted(set(heads) & set(workers)):
        problems.append(problem(host, "ray_workers", host, "is in ray_head and in ray_workers: take it out of one (a head runs tasks too)"))
    if len(servers) > 1:
        problems.append(problem("all", "nfs_server", servers, "the group nfs_server has at most one host: leave one"))
    nodes = {*heads, *workers}
    for host in sorted(nodes):
        if get[host]("llm_ray_storage") == "existing" and servers:
            fix = "existing storage needs no server: empty the group nfs_server, or set llm_ray_storage to nfs"
            problems.append(problem(host, "llm_ray_storage", "existing", fix))
    if len(nodes) > 1 and not servers and any(_lacks_storage(get[host]) for host in nodes):
        fix = "the hosts need shared storage: put one host into nfs_server (the head may be it), or set llm_ray_storage to existing"
        problems.append(problem("all", "nfs_server", [], fix))
    return problems


def _near_group(name: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Which of our groups a name was to be; empty where it is quite another's, as workers beside a group ray_workers."""
    plain = name.lower().replace("-", "_")
    short = re.sub(r"^ray_?|_?servers?$", "", plain)  # else dns_server would be near
    near = difflib.get_close_matches(short, _GROUP_NAMES, 1, 0.6 if plain.startswith("ray_") else 0.8)
    if near and (_GROUP_NAMES[near[0]] not in groups):
        return _GROUP_NAMES[near[0]]
    return next(iter(difflib.get_close_matches(plain, GROUPS, 1, 0.8)), "") if plain.startswith(("ray", "nfs")) else ""


def _lacks_storage(get: Callable[[str], Any]) -> bool:
    """Whether a node would mount from the group nfs_server alone."""
    return (get("nfs_client_storage") or get("llm_ray_storage")) != "existing" and not get("nfs_client_server")


def name_problems(host: str, names: Sequence[str], known: Mapping[str, Any], roles: Sequence[str]) -> list[Problem]:
    """Variables that begin like ours and are none, or that are nearly called as one of ours."""
    problems = []
    ours = tuple(f"{name}_" for name in (*roles, "llm_ray"))
    for name in names:
        # Ansible's own, such as groups and play_hosts, and roles' internal ones
        if name in known or name.startswith(("ansible_", "_", "inventory_")) or name in ("groups", "group_names", "omit", "hostvars"):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.6 if name.startswith(ours) else 0.8)
        if f"llm_ray_{name}" in known:
            near = [f"llm_ray_{name}"]
        if near:
            problems.append(problem(host, name, None, f"no role knows it: did you mean {near[0]}?"))
        elif name.startswith(ours):
            problems.append(problem(host, name, None, "no role knows it: inventory/sample lists all variables"))
    return problems


def type_problems(host: str, values: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Values of the wrong type or not among the choices, by Ansible's own rules."""
    problems = []
    for name, value in values.items():
        if isinstance(value, _Undecided):
            continue
        for fix in _type_fixes(name, value, known[name]):
            if known[name].get("no_log") and not isinstance(value, Exception):
                problems.append(problem(host, name, None, f"must be a {known[name]['type']}"))
            else:
                problems.append(problem(host, name, _shown(value), fix))
    return problems


def _type_fixes(name: str, value: Any, spec: Mapping[str, Any]) -> list[str]:
    if isinstance(value, Exception):
        return [_not_one(value)]
    shape, written = _SHAPES.get(spec["type"], (None, ""))
    # Ansible would let these pass: what is no list is taken apart letter by letter, and what is one becomes its text.
    if shape and not isinstance(value, shape) and not (name in _TYPED and isinstance(value, str)):
        text = "" if value is None else str(value)
        right = text if text[:1] == written[:1] else written.format(text.replace("=", ": ") if shape is dict else text)
        return [f"must be a {spec['type']}: write {right}, with -e as JSON: -e '{{\"{name}\": …}}'"]
    if not shape and (wrong := _not_one(value)):
        return [wrong]
    spec = {key: part for key, part in spec.items() if key in ("type", "choices", "elements", "options")}
    messages = ArgumentSpecValidator({name: spec}).validate({name: value}).error_messages
    return [re.sub(r"^argument '\w+' is of type", "is of type", message) for message in messages]


def _not_one(value: Any) -> str:
    """Why a value is not a single one; empty where it is."""
    if isinstance(value, Exception):
        return f"cannot be worked out: {str(value).splitlines()[0]}"
    if value is None:
        return "is empty: write a value, '' for an empty text, or take the line away"
    return f"must be one value, and is a {type(value).__name__}" if isinstance(value, list | dict) else ""


def _shown(value: Any) -> Any:
    return None if isinstance(value, Exception) else value


def value_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    """Values that are of the right type and still cannot work."""
    problems = []
    name = "ray_node_state" if get("ray_node_state") else "llm_ray_state"
    state = get(name)
    if isinstance(state, str) and len(state) + _SOCKET > _SOCKET_LIMIT:
        fix = f"too long for the sockets that Ray makes below it: at most {_SOCKET_LIMIT - _SOCKET} characters"
        problems.append(problem(host, name, state, fix))
    for name, kind, low, what in (
        ("ray_node_cpus", int, 0, "a whole number of cores"),
        ("ray_node_memory_gib", float, 0.1, "a number of GiB, such as 32"),
    ):
        value = get(name)
        if isinstance(value, str | int | float) and value != "auto" and not _at_least(value, kind, low):
            problems.append(problem(host, name, value, f"must be {what}, or auto"))
    source = get("llm_ray_wheel_source")
    if isinstance(source, str) and source and not re.match(r"/|https?://", source):
        fix = "must be a folder on the hosts, from / on, such as /srv/wheels, or a package index, such as https://pypi.example/simple"
        problems.append(problem(host, "llm_ray_wheel_source", source, fix))
    address = get("ray_node_address")
    if isinstance(address, str) and ":" in address:
        problems.append(problem(host, "ray_node_address", address, "is an IPv6 address, and Ray's nodes need IPv4 here: give such a one"))
    networks = get("llm_ray_admin_networks")
    for network in networks if isinstance(networks, list) else []:
        try:
            ipaddress.ip_network(str(network))
        except ValueError as error:
            problems.append(problem(host, "llm_ray_admin_networks", network, f"is no network: {error}; write it as 10.0.0.0/24"))
    for name in ("llm_ray_uid", "llm_ray_gid"):
        number = get(name)
        if isinstance(number, int) and not 0 < number < 60000:
            problems.append(problem(host, name, number, "must be between 1 and 59999: not root's and none that systemd gives away"))
    return problems + _port_problems(host, get)


def _at_least(value: Any, kind: type[int | float], low: float) -> bool:
    try:
        return not isinstance(value, bool) and kind(str(value)) >= low
    except ValueError:
        return False


def folder_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    """Folders that are others', too, or lie in one another: reset.yml would delete more than it should."""
    problems, found = [], list[tuple[str, str, str, str]]()
    for kind, names in _FOLDERS.items():
        for name in names:
            path = get(name)
            if not isinstance(path, str) or (not path and name == "ray_node_spill"):
                continue
            if not re.fullmatch(r"(/(?!\.\.?(/|$))[A-Za-z0-9._-]+)+", path):
                fix = "must be an absolute path of letters, digits, '.', '_' and '-', without . or .. as a part, and not /"
                problems.append(problem(host, name, path, fix))
                continue
            folder = f"{path}/llm-ray" if name == "ray_node_spill" else path  # it may be a disk of many
            if fix := _others(folder, kind in _DELETED):
                problems.append(problem(host, name, path, fix))
            else:
                found.append((kind, name, path, folder))
    for (kind, name, path, folder), (other, _, _, place) in itertools.combinations(found, 2):
        # what is spilled may go to the state's disk or the storage's
        spilled = other == "spilled objects" and kind in ("local state", "shared storage") and _within(place, folder) and place != folder
        if kind != other and not spilled and (_within(folder, place) or _within(place, folder)):
            fix = f"{kind} and {other} ({place}) must not lie in one another: give each a folder of its own"
            problems.append(problem(host, name, path, fix))
    folders = get("nfs_client_folders")
    for folder in folders if isinstance(folders, list) else []:
        if not re.fullmatch(r"(?!\.\.?$)[A-Za-z0-9._-]+", str(folder)):
            fix = "must be the name of a folder in llm_ray_home: letters, digits, '.', '_' and '-'"
            problems.append(problem(host, "nfs_client_folders", folder, fix))
    return problems


def _others(path: str, deleted: bool) -> str:
    """Why a folder cannot be the cluster's own; empty where it can."""
    for folder in _SYSTEM:
        if _within(path, folder):
            return f"{folder} is the system's: name a folder of its own elsewhere"
    for folder in (*_SHARED, *_SYSTEM):
        if path == folder:
            return f"others have their files there, too: name a folder of its own in it, such as {path}/llm-ray"
        if _within(folder, path):
            return f"{folder} lies in it, which is others', too: name a folder of its own"
    if deleted and path.count("/") == 1:
        return f"reset.yml deletes it whole: name a folder of its own in it, such as {path}/llm-ray"
    return ""


def _within(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def user_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    """Users that are somebody else: the roles lock their password, and reset.yml deletes them."""
    problems = []
    login = {name: get(name) for name in ("ansible_user", "ansible_ssh_user")}
    for name in _USERS:
        user = get(name)
        if not isinstance(user, str):
            continue
        fix = ""
        if user == "root":
            fix = "must not be root: name a user of the cluster's own, such as ray, which site.yml makes"
        elif user in login.values():
            variable = next(key for key, value in login.items() if value == user)
            fix = f"is who Ansible logs in as ({variable}), and would be locked out: name a user of the cluster's own, such as ray"
        elif not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
            fix = "must be a user's name: small letters, digits, '_' and '-', at most 32"
        elif name == "monitoring_user" and user in (get("llm_ray_user"), get("host_base_user")):
            fix = "is llm_ray_user too, and goes when monitoring goes: name another, such as llm-ray-monitoring"
        if fix:
            problems.append(problem(host, name, user, fix))
    return problems


_PORTS = (
    "ray_node_port", "ray_node_node_manager_port", "ray_node_object_manager_port", "ray_node_runtime_env_agent_port",
    "ray_node_metrics_export_port", "ray_node_dashboard_agent_grpc_port", "ray_node_dashboard_agent_port", "ray_node_dashboard_port",
    "ray_node_client_port", "llm_ray_serve_port",
)  # fmt: skip


def _port_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    problems, taken = [], dict[int, str]()
    single = [*_PORTS]
    if boolean(get("monitoring_enabled"), strict=False):
        single += ["monitoring_port"] + ["monitoring_node_exporter_port"] * boolean(get("monitoring_node_exporter"), strict=False)
    ports = {name: get(name) for name in (*single, "ray_node_min_worker_port", "ray_node_max_worker_port")}
    low, high = ports["ray_node_min_worker_port"], ports["ray_node_max_worker_port"]
    workers = range(low, high + 1) if isinstance(low, int) and isinstance(high, int) else range(0)
    for name, port in ports.items():
        if not isinstance(port, int):
            continue
        if not 1024 <= port <= 65535:
            problems.append(problem(host, name, port, "must be a port between 1024 and 65535"))
        elif port in taken:
            problems.append(problem(host, name, port, f"is the port of {taken[port]} too: choose another"))
        elif name in single and port in workers:
            problems.append(problem(host, name, port, f"lies among the ports of Ray's workers, {low} to {high}: choose another"))
        taken.setdefault(port, name)
    if isinstance(low, int) and isinstance(high, int) and high - low < 99:
        fix = f"must leave 100 ports or more above ray_node_min_worker_port ({low}): every worker process takes one"
        problems.append(problem(host, "ray_node_max_worker_port", high, fix))
    return problems


def same_problems(values: Mapping[str, _Values], known: Mapping[str, Any]) -> list[Problem]:
    """Variables of the whole cluster that have different values on some hosts."""
    problems = []
    for name in sorted(name for name, spec in known.items() if name.startswith("llm_ray_") and not spec.get("no_log")):
        by_host = {host: json.dumps(one.get(name), sort_keys=True) for host, one in values.items() if one.decided(name)}
        common = Counter(by_host.values()).most_common(1)[0][0] if by_host else None
        for host, value in by_host.items():
            if value != common:
                fix = f"must be the same on every host, and elsewhere is {common}: set it in group_vars/all alone"
                problems.append(problem(host, name, json.loads(value), fix))
    return problems


def address_problems(values: Mapping[str, _Values]) -> list[Problem]:
    """Two names for one address."""
    seen: dict[tuple[str, ...], str] = {}
    problems = []
    for host, one in values.items():
        given = {"ansible_host": host, "ansible_port": 22}
        given |= {name: one.templated(name) for name in given if name in one.variables}
        if any(isinstance(value, _Undecided) for value in given.values()):
            continue
        if wrong := {name: fix for name, value in given.items() if (fix := _not_one(value))}:
            problems += [problem(host, name, _shown(given[name]), fix) for name, fix in wrong.items()]
            continue
        address = tuple(map(str, given.values()))
        if address in seen:
            problems.append(problem(host, "ansible_host", address[0], f"is the address of {seen[address]} too: one host has one name"))
        seen.setdefault(address, host)
    return problems


def node_address_problems(values: Mapping[str, _Values]) -> list[Problem]:
    """Two hosts with one address in the cluster, such as one that is set for all."""
    seen: dict[str, str] = {}
    problems = []
    for host, one in values.items():
        address = one.get("ray_node_address")
        if not isinstance(address, str) or not address:
            continue
        if address in seen:
            fix = f"is the address of {seen[address]} too: each host has its own: set it in host_vars"
            problems.append(problem(host, "ray_node_address", address, fix))
        seen.setdefault(address, host)
    return problems


def runtime_problems(groups: Mapping[str, Sequence[str]], values: Mapping[str, _Values]) -> list[Problem]:
    """Nodes in Docker whose image would be built, or handed on, by a head that has no Docker."""
    heads = [host for host in groups.get("ray_head", []) if _runtime(values[host]) == "bare_metal"]
    problems = []
    for host in groups.get("ray_workers", []) if heads else []:
        get = values[host].get
        pulled = get("ray_node_registry") and get("ray_node_image_builder") == "control" and not get("llm_ray_offline_bundle")
        if _runtime(values[host]) == "docker" and not get("ray_node_image") and not pulled:
            fix = (
                f"its image comes from the head ({heads[0]}), which is bare_metal and gets no Docker: give the head docker too, all hosts "
                "bare_metal, or name an image that hosts can pull (ray_node_image)"
            )
            problems.append(problem(host, "ray_node_runtime", "docker", fix))
    return problems


def _runtime(values: _Values) -> Any:
    return values.get("ray_node_runtime") or values.get("llm_ray_runtime")


def _merged(problems: list[Problem], hosts: Sequence[str]) -> list[Problem]:
    """The same finding on every host is one, of all."""
    by_finding: dict[str, list[Problem]] = defaultdict(list)
    for one in problems:
        by_finding[json.dumps([one["variable"], one["value"], one["fix"]], default=str)].append(one)
    return [
        found[0] | ({"host": "all"} if len(hosts) > 1 and len(found) == len(hosts) else {"host": ", ".join(one["host"] for one in found)})
        for found in by_finding.values()
    ]


# The hosts

_SUPPORTED = {"Debian": ["12"], "Ubuntu": ["22.04", "24.04"], "RedHat": ["8", "9"]}


def preflight_hosts(probes: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """What is wrong with the hosts.

    probes: of each host what the module preflight_probe returned, with what the role knows of it added (os, version, family,
    storage, settings: the role's variables without their prefix); an empty one: the host was not reached.
    """
    problems = []
    for host, probe in probes.items():
        if not probe:
            fix = (
                "not reached: see the error above (ssh to it by hand, check ansible_host and ansible_user; RHEL 8 needs python3.11 and "
                "ansible_python_interpreter: docs/reference/support.md), or leave it out with --limit"
            )
            problems.append(problem(host, "ansible_host", None, fix))
            continue
        if probe["is_node"]:
            problems += _software(host, probe) + _power(host, probe)
        problems += _system(host, probe) + _disk(host, probe) + _network(host, probe) + _storage(host, probe) + _accounts(host, probe)
    reached = {host: probe for host, probe in probes.items() if probe}
    return _merged(problems + _together(reached), list(probes))


def _system(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    family = probe["family"] if probe["family"] == "RedHat" else probe["os"]
    version = probe["version"] if family == "Ubuntu" else probe["version"].split(".")[0]
    if version in _SUPPORTED.get(family, []) or probe["settings"]["allow_other_os"]:
        return []
    fix = "not supported: Debian 12, Ubuntu 22.04 and 24.04, RHEL or Rocky 8 and 9 are; to try all the same set preflight_allow_other_os"
    return [problem(host, "operating system", f"{probe['os']} {probe['version']}", fix)]


def _software(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    """What a node runs: its Python, by itself or in an image, and the CPU that its packages are built for."""
    problems = []
    python = probe["python"]
    if probe["runtime"] == "bare_metal" and python["version"] and not _fits(python):
        fix = (
            "Ray nodes need Python 3.11 or 3.12: name one in python_runtime_python, such as /usr/bin/python3.12 or uv:3.11.14, "
            "or set llm_ray_runtime to docker"
        )
        problems.append(problem(host, "python_runtime_python", f"{python['path']} is {_dotted(python['version'])}", fix))
    if probe["runtime"] == "bare_metal" and not python["version"] and not python["installable"]:
        fix = "not there: install a standalone Python at that path (uv python install 3.11), or set llm_ray_runtime to docker"
        problems.append(problem(host, "python_runtime_python", python["path"], fix))
    image = probe["image_python"]
    if probe["runtime"] == "docker" and image and not _fits({"version": [*map(int, image.split("."))]}):
        fix = f"the image has Python {image}, and Ray nodes need 3.11 or 3.12: take another, such as python:3.11.14-slim-bookworm"
        problems.append(problem(host, "ray_node_image_base", image, fix))
    missing = sorted(set(probe["settings"]["cpu_flags"]) - set(probe["flags"]))
    if missing:
        fix = "the CPU lacks it, and torch and vLLM are built for it: use another host, or change preflight_cpu_flags"
        problems.append(problem(host, "preflight_cpu_flags", missing, fix))
    return problems


def _power(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    """Cores and memory of a node."""
    problems, settings = [], probe["settings"]
    if probe["cores"] < settings["min_cores"]:
        fix = f"cores: at least {settings['min_cores']} are needed (preflight_min_cores)"
        problems.append(problem(host, "cores", probe["cores"], fix))
    memory = probe["memory"] / _GIB
    if memory < settings["min_memory_gib"]:
        fix = f"GiB of memory: at least {settings['min_memory_gib']} are needed (preflight_min_memory_gib)"
        problems.append(problem(host, "memory", round(memory, 1), fix))
    store, shm = probe["object_store_gib"], probe["shm"] / _GIB
    if store > shm:
        fix = f"larger than /dev/shm ({shm:.1f} GiB): Ray would not start; lower it, or mount /dev/shm larger"
        problems.append(problem(host, "ray_node_object_store_gib", store, fix))
    elif store > _STORE_SHARE * memory:
        fix = f"leaves too little of {memory:.1f} GiB of memory to everything else: at most {_STORE_SHARE * memory:.1f}"
        problems.append(problem(host, "ray_node_object_store_gib", store, fix))
    return problems


def _disk(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    needed = 1 if probe["installed"] else probe["settings"]["min_disk_gib"]  # what is installed needs no room again
    fix = "GiB free: at least {} are needed where {} lies: make room (preflight_min_disk_gib)"
    return [
        problem(host, f"disk of {path}", round(free / _GIB, 1), fix.format(needed, path))
        for path, free in probe["free"].items()
        if free / _GIB < needed
    ]


def _network(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    problems, allowed = [], probe["settings"]["max_clock_skew"]
    if probe["is_node"] and not probe["address"]:
        why = "is made of a fact that this host has not" if probe["address_given"] else "no default route"
        fix = f"{why}: set ray_node_address (its address in the cluster's network) in host_vars/{host}.yml"
        problems.append(problem(host, "ray_node_address", None, fix))
    if probe["storage"] == "nfs_server" and not probe["nfs_address"]:
        fix = f"no default route: set nfs_server_address (its address in the cluster's network) in host_vars/{host}.yml"
        problems.append(problem(host, "nfs_server_address", None, fix))
    for taken in probe["taken"]:
        fix = f"port {taken['port']} is taken by {taken['by'] or 'another process'}: stop that, or set another port"
        problems.append(problem(host, taken["name"], taken["port"], fix))
    for target, reason in probe["unreached"].items():
        fix = f"cannot be reached from {host} ({reason}): check routes, firewalls and ray_node_address"
        problems.append(problem(host, "address of the head or the NFS server", target, fix))
    skew = max(probe["started"] - probe["now"], probe["now"] - probe["finished"], 0)
    if skew > allowed:
        fix = f"seconds off this machine's clock, {allowed} are allowed: set the clocks by NTP (preflight_max_clock_skew)"
        problems.append(problem(host, "clock", round(skew, 1), fix))
    return problems


def _storage(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    storage, home = probe["storage"], probe["home"]
    if storage == "existing" and not home["directory"]:
        return [problem(host, "llm_ray_home", home["path"], "existing storage must be mounted there before the cluster is made: mount it")]
    if storage == "nfs_client" and home["entries"] and not home["mounted"]:
        fix = "the folder holds files of this host, which the NFS mount would hide: move them to the server, or choose another path"
        return [problem(host, "llm_ray_home", home["path"], fix)]
    lacks = {"nfs_client": "nfs", "nfs_server": "nfsd"}.get(storage)
    if lacks and lacks not in probe["filesystems"]:
        fix = f"the kernel of this host has no {lacks} (a container?): use a real host, or set llm_ray_storage to existing"
        return [problem(host, "llm_ray_storage", "nfs", fix)]
    return []


def _accounts(host: str, probe: Mapping[str, Any]) -> list[Problem]:
    """Accounts that are not what site.yml has made, and ids that are taken."""
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
    """What only a look at all hosts shows."""
    problems = []
    for key, what, fix in (
        ("machine_id", "/etc/machine-id", "is the same as on {}: a cloned image; rm /etc/machine-id, systemd-machine-id-setup, reboot"),
        ("hostname", "host name", "is the same as on {}: hostnamectl hostname NAME"),
    ):
        seen: dict[str, str] = {}
        for host, probe in probes.items():
            if probe[key] in seen:
                problems.append(problem(host, what, probe[key], fix.format(seen[probe[key]])))
            elif probe[key]:
                seen[probe[key]] = host
    nodes = {host: probe for host, probe in probes.items() if probe["is_node"]}
    versions = {host: _dotted(p["python"]["version"]) for host, p in nodes.items() if p["runtime"] == "bare_metal" and _fits(p["python"])}
    homes = {host: str(p["home"]["inode"]) for host, p in nodes.items() if p["storage"] == "existing" and p["home"]["directory"]}
    for found, variable, fix in (
        (versions, "python_runtime_python", "Ray wants the same patch level on every host, and elsewhere it is {}: install that one"),
        (homes, "llm_ray_home", "not the folder that other hosts have there: mount the same shared file system on every host"),
    ):
        if len(set(found.values())) > 1:
            common = Counter(found.values()).most_common(1)[0][0]
            shown = {host: value if found is versions else nodes[host]["home"]["path"] for host, value in found.items()}
            problems += [problem(host, variable, shown[host], fix.format(common)) for host, value in found.items() if value != common]
    problems += _dropped(probes, nodes)
    images = {host: probe["image_python"] for host, probe in nodes.items() if probe["runtime"] == "docker" and probe["image_python"]}
    bare = sorted(set(versions.values()))
    fix = "the image has this Python, and hosts without Docker have {}: choose an image with that one, or one runtime for all hosts"
    problems += [
        problem(host, "ray_node_image_base", version, fix.format(bare[0]))
        for host, version in images.items()
        if bare and version != bare[0]
    ]
    return problems


def _dropped(probes: Mapping[str, Mapping[str, Any]], nodes: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Hosts whose own ufw drops what nodes send: that the bundle's rules accept it does not stop ufw's."""
    problems = []
    for host, probe in probes.items():
        if probe["ufw"] is None or probe["firewall"] == "none":  # none: ufw is how the user closes the ports
            continue
        let_in = [ipaddress.ip_network(source, strict=False) for source in probe["ufw"]]
        others = [node["address"] for name, node in nodes.items() if name != host and re.fullmatch("[0-9.]+", node["address"])]
        dropped = [address for address in others if not any(ipaddress.ip_address(address) in network for network in let_in)]
        if dropped:
            fix = (
                "ufw is active and drops what these nodes send: ufw allow from ADDRESS for each of them, or ufw disable: the bundle's "
                "firewall closes the cluster's ports itself (firewall_provider)"
            )
            problems.append(problem(host, "ufw", dropped, fix))
    return problems


def _fits(python: Mapping[str, Any]) -> bool:
    return (3, 11) <= tuple(python["version"][:2]) <= (3, 12)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def preflight_list(problems: Sequence[Problem]) -> str:
    """The problems as lines to read: host: variable = value: what to do."""
    lines = []
    for one in problems:
        value = "" if one["value"] is None else f" = {json.dumps(one['value'], default=str)}"
        lines.append(f"{one['host']}: {one['variable']}{value}: {one['fix']}")
    return "\n".join(lines)


class FilterModule:
    """What Ansible asks a filter plugin for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "preflight_inventory": preflight_inventory,
            "preflight_values": preflight_values,
            "preflight_reach": preflight_reach,
            "preflight_hosts": preflight_hosts,
            "preflight_list": preflight_list,
        }
