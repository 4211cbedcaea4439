"""Finds problems in an inventory without contacting hosts; needs no facts.

{{ hostvars | preflight_inventory(groups, roles_folder) }} returns a list of problems with the keys host, variable,
value and fix. {{ hostvars[host] | preflight_values(roles_folder) }} returns a host's values of all variables in the
roles' argument_specs. {{ hostvars | preflight_reach(groups, host, roles_folder) }} returns the addresses that a node
must reach.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.parsing.convert_bool import boolean

Problem = dict[str, Any]
GROUPS = ("ray_head", "ray_workers", "nfs_server")
_PATH = re.compile(r"(/(?!\.\.?(/|$))[A-Za-z0-9._-]+)+")  # absolute
# Likely misnomers of the groups.
_GROUP_NAMES = {name: name for name in GROUPS} | {"head": "ray_head", "workers": "ray_workers", "nfs": "nfs_server"}
# The longest path below llm_ray_state: a socket in Ray's session folder. Socket paths have at most 107 characters.
_SOCKET = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_SOCKET_LIMIT = 107
# Variables of folders by content. Folders of different kinds must be separate, since reset.yml deletes all of a kind or
# none.
_FOLDERS = {
    "software": ("llm_ray_prefix", "python_runtime_prefix", "ray_node_prefix"),
    "local state": ("llm_ray_state", "host_base_state", "ray_node_state", "ray_job_state"),
    "monitoring's data": ("monitoring_data",),
    "shared storage": ("llm_ray_home", "nfs_client_path", "nfs_server_path", "ray_node_home", "ray_job_home"),
    "spilled objects": ("ray_node_spill",),
}
_DELETED = ("software", "local state", "monitoring's data")
# Folders shared with others, and folders of the system, in which the cluster must not put anything.
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
_TYPED = ("bundle_model",)  # a list that may also be given as a,b
# Names that are only defined in tasks, in addition to the roles' own.
_LATER = {
    "ansible_facts",
    "ansible_host",
    "ansible_play_batch",
    "ansible_play_hosts",
    "ansible_play_hosts_all",
    "ansible_user",
    "hostvars",
}


def problem(host: str, variable: str, value: Any, fix: str) -> Problem:
    return {"host": host, "variable": variable, "value": value, "fix": fix}


def specs(roles: str | Path) -> dict[str, dict[str, Any]]:
    """Returns every variable that a user may set, with its argument spec and role, from the roles'
    meta/argument_specs.yml."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(roles).glob("*/meta/argument_specs.yml")):
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            found |= {
                name: spec | {"role": path.parent.parent.name} for name, spec in (entry.get("options") or {}).items()
            }
    return found


def preflight_inventory(hostvars: Any, groups: Mapping[str, Sequence[str]], roles: str) -> list[Problem]:
    """Returns the problems in the inventory, without contacting hosts.

    hostvars and groups are Ansible's; roles is the folder of the roles with their argument_specs.
    """
    known = specs(roles)
    owners = [path.parent.parent.name for path in Path(roles).glob("*/meta/argument_specs.yml")]
    hosts = sorted({host for group in GROUPS for host in groups.get(group, [])})
    variables = {host: _variables(hostvars, host) for host in hosts}
    values = {host: _Values(hostvars[host], known, _raw(hostvars, host)) for host in hosts}
    problems = group_problems(groups, {host: values[host].get for host in hosts})
    for host in hosts:
        problems += name_problems(host, variables[host], known, owners)
        problems += type_problems(
            host, {name: values[host].templated(name) for name in variables[host] if name in known}, known
        )
        problems += value_problems(host, values[host].get)
        problems += folder_problems(host, values[host].get) + user_problems(host, values[host].get)
    problems += same_problems(values, known) + address_problems(values) + node_address_problems(values)
    return problems + runtime_problems(groups, values)


def preflight_values(variables: Mapping[str, Any], roles: str) -> dict[str, Any]:
    """Returns a host's values of all non-secret variables in the argument_specs: the inventory's, else the spec's
    default."""
    known = specs(roles)
    values = _Values(variables, known)
    names = [name for name, spec in known.items() if not spec.get("no_log")]
    found = {name: value for name in names if (value := values.default(name)) is not None}
    return found | {name: value for name in names if (value := values.get(name)) is not None}


def preflight_reach(hostvars: Any, groups: Mapping[str, Sequence[str]], host: str, roles: str) -> list[str]:
    """Returns a node's addresses of the head and the NFS server: those set in the inventory, else those of the
    facts."""
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
    """A value that cannot be determined yet or here."""


class _Values:
    """A host's templated variables, with the spec's defaults for unset ones."""

    def __init__(
        self, variables: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], raw: Mapping[str, Any] | None = None
    ) -> None:
        self.variables, self.known, self.raw = variables, known, raw or {}

    def templated(self, name: str) -> Any:
        """Returns the value of a set variable, or (instead of raising) the exception if it cannot be evaluated."""
        try:
            return _plain(self.variables[name])
        except Exception as error:
            return _Undecided() if _vaulted(error) or self._later(name) else error

    def _later(self, name: str) -> bool:
        """Returns whether a value depends, directly or indirectly, on what is only defined in tasks: facts, other
        hosts, roles' variables."""
        seen, todo = set[str](), [name]
        while todo:
            words = set(re.findall(r"[A-Za-z_]\w*", repr(self.raw.get(todo.pop())))) - seen
            if any(word in _LATER or word.startswith("__") or self._default_beside(name, word) for word in words):
                return True
            seen |= words
            todo += words & set(self.raw)
        return False

    def _default_beside(self, name: str, other: str) -> bool:
        """Returns whether tasks that use the variable also have the other one, as a default of the same role. No role
        has defaults for llm_ray_*."""
        if other in self.raw or other.startswith("llm_ray_") or not {name, other} <= set(self.known):
            return False
        return bool(self.known[name]["role"] == self.known[other]["role"])

    def decided(self, name: str) -> bool:
        return name not in self.variables or not isinstance(self.templated(name), _Undecided)

    def get(self, name: str) -> Any:
        """Returns the value, or the default if it is not a template; None if it cannot be determined before contacting
        hosts."""
        if name not in self.variables:
            return self.default(name)
        value = self.templated(name)
        if isinstance(value, str) and value.isdecimal() and self.known.get(name, {}).get("type") == "int":
            return int(value)  # -e passes strings
        return None if isinstance(value, Exception) else value

    def default(self, name: str) -> Any:
        default = self.known.get(name, {}).get("default")
        return None if isinstance(default, str) and "{{" in default else default


def _raw(hostvars: Any, host: str) -> Mapping[str, Any]:
    """Returns a host's untemplated variables."""
    return getattr(hostvars, "raw_get", hostvars.get)(host)


def _vaulted(error: BaseException | None) -> bool:
    """Returns whether a value is in a vault whose password is missing: values that are needed here are not secret."""
    while error:
        if "decrypt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _variables(hostvars: Any, host: str) -> list[str]:
    return [str(name) for name in hostvars[host]]


def _plain(value: Any) -> Any:
    """Converts Ansible's lists and dictionaries to Python's."""
    return json.loads(json.dumps(value, default=str))


def group_problems(groups: Mapping[str, Sequence[str]], get: Mapping[str, Callable[[str], Any]]) -> list[Problem]:
    """Checks for exactly one head, no duplicate hosts, no hosts excluded by a misspelled group, and storage that fits
    the groups."""
    heads, workers, servers = ([*groups.get(name, [])] for name in GROUPS)
    problems = []
    for name in sorted(set(groups) - {"all", "ungrouped"}):
        left_out = sorted({*groups[name]} - {*heads, *workers, *servers})
        near = "" if name in GROUPS else _near_group(name, groups)
        if near and (left_out or (near == "ray_head" and not heads)):
            fix = f"the group {name} means nothing here: did you mean {near}?"
            problems.append(
                problem("all", "group", name, f"{fix} {', '.join(left_out)} would be left out" if left_out else fix)
            )
    if len(heads) != 1:
        problems.append(
            problem("all", "ray_head", heads, f"the group ray_head must have exactly one host, and has {len(heads)}")
        )
    for host in sorted(set(heads) & set(workers)):
        problems.append(
            problem(
                host,
                "ray_workers",
                host,
                "is in ray_head and in ray_workers: take it out of one (a head runs tasks too)",
            )
        )
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
    """Returns the group that a name was probably meant to be; empty if it is unrelated, such as workers next to
    ray_workers."""
    plain = name.lower().replace("-", "_")
    short = re.sub(r"^ray_?|_?servers?$", "", plain)  # otherwise dns_server would match
    near = difflib.get_close_matches(short, _GROUP_NAMES, 1, 0.6 if plain.startswith("ray_") else 0.8)
    if near and (_GROUP_NAMES[near[0]] not in groups):
        return _GROUP_NAMES[near[0]]
    return next(iter(difflib.get_close_matches(plain, GROUPS, 1, 0.8)), "") if plain.startswith(("ray", "nfs")) else ""


def _lacks_storage(get: Callable[[str], Any]) -> bool:
    """Returns whether a node can only mount from the group nfs_server."""
    return (get("nfs_client_storage") or get("llm_ray_storage")) != "existing" and not get("nfs_client_server")


def name_problems(host: str, names: Sequence[str], known: Mapping[str, Any], roles: Sequence[str]) -> list[Problem]:
    """Checks for unknown variables with our prefixes, and for misspellings of our variables."""
    problems = []
    ours = tuple(f"{name}_" for name in (*roles, "llm_ray"))
    for name in names:
        # Ansible's own, such as groups and play_hosts, and roles' internal ones
        if (
            name in known
            or name.startswith(("ansible_", "_", "inventory_"))
            or name in ("groups", "group_names", "omit", "hostvars")
        ):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.6 if name.startswith(ours) else 0.8)
        if f"llm_ray_{name}" in known:
            near = [f"llm_ray_{name}"]
        if near:
            problems.append(problem(host, name, None, f"no role has such a variable: did you mean {near[0]}?"))
        elif name.startswith(ours):
            problems.append(
                problem(host, name, None, "no role has such a variable: inventory/sample lists all variables")
            )
    return problems


def type_problems(host: str, values: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Checks types and choices by Ansible's own rules."""
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
    # Ansible would accept these: it splits a string into a list of letters, and converts a list to a string.
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
    """Returns why a value is not a single one; empty if it is."""
    if isinstance(value, Exception):
        return f"cannot be evaluated: {str(value).splitlines()[0]}"
    if value is None:
        return "is empty: write a value, '' for an empty text, or delete the line"
    return f"must be a single value, but is a {type(value).__name__}" if isinstance(value, list | dict) else ""


def _shown(value: Any) -> Any:
    return None if isinstance(value, Exception) else value


def value_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    """Checks for values of the right type that cannot work."""
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
        problems.append(
            problem(host, "ray_node_address", address, "is an IPv6 address, but Ray nodes need IPv4 here: use one")
        )
    networks = get("llm_ray_admin_networks")
    for network in networks if isinstance(networks, list) else []:
        try:
            ipaddress.ip_network(str(network))
        except ValueError as error:
            problems.append(
                problem(host, "llm_ray_admin_networks", network, f"is not a network: {error}; write it as 10.0.0.0/24")
            )
    for name in ("llm_ray_uid", "llm_ray_gid"):
        number = get(name)
        if isinstance(number, int) and not 0 < number < 60000:
            problems.append(
                problem(host, name, number, "must be between 1 and 59999: neither root's nor one that systemd assigns")
            )
    return problems + _page_problems(host, get) + _port_problems(host, get)


def _page_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    """Checks how the page is reached. Its users are secret and only checked by the page's own command."""
    problems = []
    for name, shape, what in (
        ("page_host", _is_address, "an address of the head, such as 127.0.0.1 or 0.0.0.0 for all"),
        ("page_trusted_proxy", lambda value: not value or _is_address(value), "the proxy's address, such as 127.0.0.1"),
        (
            "page_names",
            re.compile(r"[A-Za-z0-9.-]+(:\d+)?").fullmatch,
            "a host's name, such as llm.example.org, or NAME:PORT",
        ),
        (
            "page_origins",
            re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?").fullmatch,
            "a scheme and a name, such as https://llm.example.org",
        ),
        (
            "page_tls_certificate",
            _is_file_or_empty,
            "the absolute path of a file on the head: letters, digits, '.', '_' and '-'",
        ),
        (
            "page_tls_key",
            _is_file_or_empty,
            "the absolute path of a file on the head: letters, digits, '.', '_' and '-'",
        ),
    ):
        value = get(name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not shape(one):
                problems.append(problem(host, name, one, f"must be {what}"))
    for name, other in (("page_tls_certificate", "page_tls_key"), ("page_tls_key", "page_tls_certificate")):
        if get(name) and get(other) == "":
            problems.append(problem(host, other, "", f"is empty, and {name} is given: the page needs both, or none"))
    most = get("page_max_upload_mib")
    if isinstance(most, int) and most < 1:
        problems.append(problem(host, "page_max_upload_mib", most, "must be 1 or more"))
    address, port, served = get("page_host"), get("page_port"), get("firewall_served_ports")
    beyond = isinstance(address, str) and not re.match(r"127\.|::1$|localhost$", address)
    known = isinstance(served, list) and not any("{{" in str(one) for one in served)
    if beyond and known and str(port) not in map(str, served) and get("firewall_provider") != "none":
        fix = (
            f"the firewall does not guard the page's port, {port} (page_port), and page_host is {address}: add it here"
        )
        problems.append(problem(host, "firewall_served_ports", served, fix))
    return problems


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return text == "localhost"


def _is_file_or_empty(text: str) -> bool:
    return not text or bool(_PATH.fullmatch(text))


def _at_least(value: Any, kind: type[int | float], low: float) -> bool:
    try:
        return not isinstance(value, bool) and kind(str(value)) >= low
    except ValueError:
        return False


def folder_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    """Checks for folders that others use or that contain one another: reset.yml would delete too much."""
    problems, found = [], list[tuple[str, str, str, str]]()
    for kind, names in _FOLDERS.items():
        for name in names:
            path = get(name)
            if not isinstance(path, str) or (not path and name == "ray_node_spill"):
                continue
            if not _PATH.fullmatch(path):
                fix = "must be an absolute path of letters, digits, '.', '_' and '-', without . or .. as a part, and not /"
                problems.append(problem(host, name, path, fix))
                continue
            folder = f"{path}/llm-ray" if name == "ray_node_spill" else path  # the disk may be shared
            if fix := _others(folder, kind in _DELETED):
                problems.append(problem(host, name, path, fix))
            else:
                found.append((kind, name, path, folder))
    for (kind, name, path, folder), (other, _, _, place) in itertools.combinations(found, 2):
        # objects may spill to the disk of the local state or the storage
        spilled = (
            other == "spilled objects"
            and kind in ("local state", "shared storage")
            and _within(place, folder)
            and place != folder
        )
        if kind != other and not spilled and (_within(folder, place) or _within(place, folder)):
            fix = f"{kind} and {other} ({place}) must not contain one another: give each a folder of its own"
            problems.append(problem(host, name, path, fix))
    folders = get("nfs_client_folders")
    for folder in folders if isinstance(folders, list) else []:
        if not re.fullmatch(r"(?!\.\.?$)[A-Za-z0-9._-]+", str(folder)):
            fix = "must be the name of a folder in llm_ray_home: letters, digits, '.', '_' and '-'"
            problems.append(problem(host, "nfs_client_folders", folder, fix))
    return problems


def _others(path: str, deleted: bool) -> str:
    """Returns why a folder cannot be the cluster's own; empty if it can."""
    for folder in _SYSTEM:
        if _within(path, folder):
            return f"{folder} is the system's: name a folder of its own elsewhere"
    for folder in (*_SHARED, *_SYSTEM):
        if path == folder:
            return f"others keep files there, too: name a folder of its own in it, such as {path}/llm-ray"
        if _within(folder, path):
            return f"it contains {folder}, which others use too: name a folder of its own"
    if deleted and path.count("/") == 1:
        return f"reset.yml deletes it whole: name a folder of its own in it, such as {path}/llm-ray"
    return ""


def _within(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def user_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    """Checks for users that belong to someone else: the roles lock their password, and reset.yml deletes them."""
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
            fix = f"is the user that Ansible logs in as ({variable}), and would be locked out: name a user of the cluster's own, such as ray"
        elif not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
            fix = "must be a user's name: lowercase letters, digits, '_' and '-', at most 32"
        elif name == "monitoring_user" and user in (get("llm_ray_user"), get("host_base_user")):
            fix = "is llm_ray_user too, and goes when monitoring goes: name another, such as llm-ray-monitoring"
        if fix:
            problems.append(problem(host, name, user, fix))
    return problems


_PORTS = (
    "ray_node_port", "ray_node_node_manager_port", "ray_node_object_manager_port", "ray_node_runtime_env_agent_port",
    "ray_node_metrics_export_port", "ray_node_dashboard_agent_grpc_port", "ray_node_dashboard_agent_port", "ray_node_dashboard_port",
    "ray_node_client_port", "llm_ray_serve_port", "page_port",
)  # fmt: skip


def _port_problems(host: str, get: Callable[[str], Any]) -> list[Problem]:
    problems, used = [], dict[int, str]()
    single = [*_PORTS]
    if boolean(get("monitoring_enabled"), strict=False):
        single += ["monitoring_port"] + ["monitoring_node_exporter_port"] * boolean(
            get("monitoring_node_exporter"), strict=False
        )
    ports = {name: get(name) for name in (*single, "ray_node_min_worker_port", "ray_node_max_worker_port")}
    low, high = ports["ray_node_min_worker_port"], ports["ray_node_max_worker_port"]
    workers = range(low, high + 1) if isinstance(low, int) and isinstance(high, int) else range(0)
    for name, port in ports.items():
        if not isinstance(port, int):
            continue
        if not 1024 <= port <= 65535:
            problems.append(problem(host, name, port, "must be a port between 1024 and 65535"))
        elif port in used:
            problems.append(problem(host, name, port, f"is the port of {used[port]} too: choose another"))
        elif name in single and port in workers:
            problems.append(
                problem(host, name, port, f"lies among the ports of Ray's workers, {low} to {high}: choose another")
            )
        used.setdefault(port, name)
    if isinstance(low, int) and isinstance(high, int) and high - low < 99:
        fix = f"must leave 100 ports or more above ray_node_min_worker_port ({low}): every worker process takes one"
        problems.append(problem(host, "ray_node_max_worker_port", high, fix))
    return problems


def same_problems(values: Mapping[str, _Values], known: Mapping[str, Any]) -> list[Problem]:
    """Checks for cluster-wide variables that differ between hosts."""
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
    """Checks for two names with one address."""
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
            problems.append(
                problem(
                    host, "ansible_host", address[0], f"is the address of {seen[address]} too: one host has one name"
                )
            )
        seen.setdefault(address, host)
    return problems


def node_address_problems(values: Mapping[str, _Values]) -> list[Problem]:
    """Checks for hosts with the same address in the cluster, such as one set for all."""
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
    """Checks for Docker nodes whose image would come from a head without Docker."""
    heads = [host for host in groups.get("ray_head", []) if _runtime(values[host]) == "bare_metal"]
    problems = []
    for host in groups.get("ray_workers", []) if heads else []:
        get = values[host].get
        pulled = (
            get("ray_node_registry")
            and get("ray_node_image_builder") == "control"
            and not get("llm_ray_offline_bundle")
        )
        if _runtime(values[host]) == "docker" and not get("ray_node_image") and not pulled:
            fix = (
                f"its image comes from the head ({heads[0]}), which is bare_metal and gets no Docker: give the head "
                "docker too, all hosts bare_metal, or name an image that hosts can pull (ray_node_image)"
            )
            problems.append(problem(host, "ray_node_runtime", "docker", fix))
    return problems


def _runtime(values: _Values) -> Any:
    return values.get("ray_node_runtime") or values.get("llm_ray_runtime")


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "preflight_inventory": preflight_inventory,
            "preflight_values": preflight_values,
            "preflight_reach": preflight_reach,
        }
