#!/usr/bin/python
"""Collects what preflight needs to know about a host beside Ansible's facts. Changes nothing and needs only Python's
standard library. The part shared with `llm-ray doctor` is in host_facts (llm_ray/host/facts.py)."""

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
short_description: Collect what preflight needs to know about a host
description: Reads CPU flags, free disk space, ports in use, reachable addresses, ufw, accounts, the shared folder, a Python and the clock.
author: LLM on Ray
options:
  ports: {description: "Ports, or from-to, by the variable that sets them.", type: dict, required: true}
  uid: {description: "User id whose sockets, like those of the users, do not count as others'.", type: int, required: true}
  gid: {description: Desired id of the user's group., type: int, required: true}
  users: {description: Names of users by the variable that sets them., type: dict, required: true}
  folders: {description: Folders that must not contain another account's home., type: list, elements: path, default: []}
  reach: {description: Addresses to reach., type: list, elements: str, default: []}
  reach_port: {description: Port to connect to; a refused connection counts as reachable., type: int, default: 22}
  paths: {description: Folders whose free disk space is reported., type: list, elements: path, default: []}
  current: {description: Path that exists once the host is installed., type: path, required: true}
  home: {description: The shared folder., type: path, required: true}
  python: {description: "An interpreter, or several to try.", type: list, elements: str, default: []}
"""
EXAMPLES = """
- preflight_probe:
    {ports: {ray_node_port: 6379}, uid: 1200, gid: 1200, users: {llm_ray_user: ray}, current: /opt/llm-ray/current, home: /srv/llm-ray}
"""
RETURN = "probe: {description: The collected values., type: dict, returned: always}"


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
    """Returns why a host cannot be reached; empty if it accepts or refuses the connection."""
    try:
        socket.create_connection((address, port), 5).close()
    except OSError as error:
        return "" if error.errno == errno.ECONNREFUSED else str(error)
    return ""


def ufw(port):
    """Returns the networks that an active ufw admits to one of the cluster's ports; None if ufw is not active."""
    try:
        line = ["/usr/sbin/ufw", "status", "verbose"]
        done = subprocess.run(
            line, capture_output=True, timeout=30, check=True, env=os.environ | {"LC_ALL": "C"}, text=True
        )
        return let_in(done.stdout, port)
    except (OSError, subprocess.SubprocessError):
        return None


def let_in(text, port):
    """Parses the same from ufw's status. Rules for a single interface are treated as for all."""
    if not text.startswith("Status: active"):
        return None
    address = r"[0-9.]{7,}(?:/[0-9]+)?"
    place = rf"(?:Anywhere|{address}|(?:{address} )?([0-9][0-9,:]*))(?:/tcp)?(?: on \S+)?"
    rules = re.findall(rf"^{place} +ALLOW(?: IN)? +(Anywhere|{address})(?:/tcp)? *(?:\(log.*|#.*)?$", text, re.M)
    found = [source.replace("Anywhere", "0.0.0.0/0") for ports, source in rules if not ports or covers(ports, port)]
    return found + (["0.0.0.0/0"] if "Default: allow (incoming)" in text else [])


def covers(ports, port):
    """Returns whether ports in the form 22,6379:6384 include a port."""
    ranges = [(low, high or low) for low, _, high in (part.partition(":") for part in ports.split(","))]
    return any(int(low) <= port <= int(high) for low, high in ranges)


def accounts(users, uid, gid, folders):
    """Returns existing users by variable, owners of the ids, the gid of llm_ray_user's group, and other accounts' homes
    in the folders."""
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
    """Returns an account's entry, or None."""
    try:
        return look(key)
    except KeyError:
        return None


def homes(text, folders, users):
    """Returns the folders in which other accounts in /etc/passwd have their home, with the account's name."""
    found = {}
    for line in text.splitlines():
        name, _, _, _, _, home = (line.split(":") + [""] * 6)[:6]
        for folder in folders:
            if name not in users and f"{home}/".startswith(f"{folder}/"):
                found[folder] = name
    return found


def folder(path):
    """Describes the shared folder; a mount's contents are not listed, since its server may be down."""
    place = Path(path)
    if not place.is_dir():
        return {"path": path, "directory": False, "mounted": False, "entries": 0, "inode": 0}
    mounted = place.is_mount()
    entries = 0 if mounted else len(list(place.iterdir()))
    return {"path": path, "directory": True, "mounted": mounted, "entries": entries, "inode": place.stat().st_ino}


if __name__ == "__main__":
    main()
