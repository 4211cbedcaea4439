#!/usr/bin/python
"""What preflight wants to know of a host beside Ansible's facts. It changes nothing and needs only Python's own
library. What `llm-ray doctor` asks as well is in host_facts (llm_ray/host/facts.py)."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import socket
import subprocess
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_facts import (
    cpu_flags,
    filesystems,
    free_disk,
    interpreter,
    read,
    shared_memory,
    taken,
    total_memory,
    usable_cpus,
)

DOCUMENTATION = """
module: preflight_probe
short_description: What preflight wants to know of a host
description: Reads the CPU's flags, free disk, taken ports, who can be reached, ufw, accounts, the shared folder, a Python and the clock.
author: LLM on Ray
options:
  ports: {description: "Port numbers by the variable that sets them; a key with a range is from-to.", type: dict, required: true}
  uid: {description: "User id whose sockets are no others', as are those of the users.", type: int, required: true}
  gid: {description: Id that the user's group is to have., type: int, required: true}
  users: {description: Names of users by the variable that sets them., type: dict, required: true}
  folders: {description: Folders in which no other account may have its home., type: list, elements: path, default: []}
  reach: {description: Addresses to reach., type: list, elements: str, default: []}
  reach_port: {description: Port to try them at; a refusal is an answer., type: int, default: 22}
  paths: {description: Folders whose free disk is asked for., type: list, elements: path, default: []}
  current: {description: What is there once the host is installed., type: path, required: true}
  home: {description: The shared folder., type: path, required: true}
  python: {description: "An interpreter, or several to be tried.", type: list, elements: str, default: []}
"""
EXAMPLES = """
- preflight_probe:
    {ports: {ray_node_port: 6379}, uid: 1200, gid: 1200, users: {llm_ray_user: ray}, current: /opt/llm-ray/current, home: /srv/llm-ray}
"""
RETURN = "probe: {description: what was found, type: dict, returned: always}"


def main():
    module = AnsibleModule(
        {
            "ports": {"type": "dict", "required": True},
            "uid": {"type": "int", "required": True},
            "gid": {"type": "int", "required": True},
            "users": {"type": "dict", "required": True},
            "folders": {"type": "list", "elements": "path", "default": []},
            "reach": {"type": "list", "elements": "str", "default": []},
            "reach_port": {"type": "int", "default": 22},
            "paths": {"type": "list", "elements": "path", "default": []},
            "current": {"type": "path", "required": True},
            "home": {"type": "path", "required": True},
            "python": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    asked = module.params
    found = accounts(asked["users"], asked["uid"], asked["gid"], asked["folders"])
    own = {asked["uid"], *(user["uid"] for user in found["users"].values())}
    module.exit_json(
        changed=False,
        probe={
            "now": time.time(),
            "flags": cpu_flags(read("/proc/cpuinfo")),
            "cores": usable_cpus(),
            "memory": total_memory(),
            "shm": shared_memory(),
            "free": {path: free_disk(path) for path in asked["paths"]},
            "taken": taken(asked["ports"], own),
            "unreached": {
                address: why for address in asked["reach"] if (why := unreached(address, asked["reach_port"]))
            },
            "ufw": ufw(int(asked["ports"].get("ray_node_node_manager_port", 2049))),
            "accounts": found,
            "home": folder(asked["home"]),
            "python": interpreter(asked["python"]),
            "installed": Path(asked["current"]).exists(),
            "machine_id": read("/etc/machine-id"),
            "hostname": socket.gethostname(),
            "filesystems": filesystems(),
        },
    )


def unreached(address, port):
    """Why a host cannot be reached; empty where it answers, if only by a refusal."""
    try:
        socket.create_connection((address, port), 5).close()
    except OSError as error:
        return "" if error.errno == errno.ECONNREFUSED else str(error)
    return ""


def ufw(port):
    """The networks that an active ufw lets in at a port of the cluster's; None where it is not active."""
    try:
        line = ["/usr/sbin/ufw", "status", "verbose"]
        done = subprocess.run(
            line, capture_output=True, timeout=30, check=True, env=os.environ | {"LC_ALL": "C"}, text=True
        )
        return let_in(done.stdout, port)
    except (OSError, subprocess.SubprocessError):
        return None


def let_in(text, port):
    """The same from what ufw says of itself. A rule of an interface is taken for one of all."""
    if not text.startswith("Status: active"):
        return None
    address = r"[0-9.]{7,}(?:/[0-9]+)?"
    place = rf"(?:Anywhere|{address}|(?:{address} )?([0-9][0-9,:]*))(?:/tcp)?(?: on \S+)?"
    rules = re.findall(rf"^{place} +ALLOW(?: IN)? +(Anywhere|{address})(?:/tcp)? *(?:\(log.*|#.*)?$", text, re.M)
    found = [source.replace("Anywhere", "0.0.0.0/0") for ports, source in rules if not ports or covers(ports, port)]
    return found + (["0.0.0.0/0"] if "Default: allow (incoming)" in text else [])


def covers(ports, port):
    """Whether ports as 22,6379:6384 have one."""
    ranges = [(low, high or low) for low, _, high in (part.partition(":") for part in ports.split(","))]
    return any(int(low) <= port <= int(high) for low, high in ranges)


def accounts(users, uid, gid, folders):
    """The users that are there, by variable; who has the ids; the group of llm_ray_user; whose home lies in a
    folder."""
    found = {variable: entry for variable, name in users.items() if (entry := known(pwd.getpwnam, name))}
    group = known(grp.getgrnam, users["llm_ray_user"])
    owner, others = known(pwd.getpwuid, uid), known(grp.getgrgid, gid)
    return {
        "users": {
            variable: {"name": entry.pw_name, "uid": entry.pw_uid, "home": entry.pw_dir, "shell": entry.pw_shell}
            for variable, entry in found.items()
        },
        "uid_of": owner.pw_name if owner else "",
        "gid_of": others.gr_name if others else "",
        "group": group.gr_gid if group else None,
        "homes": homes(read("/etc/passwd"), folders, [*users.values()]),
    }


def known(look, key):
    """An account's entry, or None."""
    try:
        return look(key)
    except KeyError:
        return None


def homes(text, folders, users):
    """Of the folders those in which another account of a /etc/passwd has its home, with its name."""
    found = {}
    for line in text.splitlines():
        name, _, _, _, _, home = (line.split(":") + [""] * 6)[:6]
        for folder in folders:
            if name not in users and f"{home}/".startswith(f"{folder}/"):
                found[folder] = name
    return found


def folder(path):
    """The shared folder; what lies on a mount is not listed, since a server may be gone."""
    place = Path(path)
    if not place.is_dir():
        return {"path": path, "directory": False, "mounted": False, "entries": 0, "inode": 0}
    mounted = place.is_mount()
    entries = 0 if mounted else len(list(place.iterdir()))
    return {"path": path, "directory": True, "mounted": mounted, "entries": entries, "inode": place.stat().st_ino}


if __name__ == "__main__":
    main()
