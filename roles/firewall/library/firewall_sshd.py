#!/usr/bin/python
"""Finds the ports on which the host's own sshd listens, directly or through a systemd socket."""

from __future__ import annotations

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: firewall_sshd
short_description: Find the ports on which the host's own sshd listens
description: "Queries ss and systemd. Only root's sshd counts: not ports forwarded by its sessions, nor a user's program of that name."
author: LLM on Ray
options: {}
"""
EXAMPLES = "- firewall_sshd:"
RETURN = "ports: {description: Ports of SSH., type: list, returned: always}"


def main():
    module = AnsibleModule({}, supports_check_mode=True)
    _, listens, _ = module.run_command(["ss", "-Hltnp"], check_rc=True)
    ports = listening(listens, process)
    if module.get_bin_path("systemctl"):
        ports |= activated(
            module.run_command(["systemctl", "show", "--property=Listen,ActiveState", "ssh.socket", "sshd.socket"])[1]
        )
    module.exit_json(changed=False, ports=sorted(ports))


def listening(lines, find):
    """Returns the ports of root's sshd, from lines of ss -Hltnp; find returns a process' user and title by its id, or
    None."""
    ports = set()
    for line in lines.splitlines():
        for pid in re.findall(r'\("sshd",pid=(\d+),', line):
            user, title = find(int(pid)) or (None, "")
            # The title of a session is "sshd: root@pts/0"; it may listen on forwarded ports.
            if user == 0 and (not title.startswith("sshd: ") or "[listener]" in title):
                ports.add(int(line.split()[3].rpartition(":")[2]))
    return ports


def activated(shown):
    """Returns the ports of active sockets, from systemctl show's output, a paragraph per unit."""
    active = [unit for unit in shown.split("\n\n") if "ActiveState=active" in unit.splitlines()]
    return {int(port) for unit in active for port in re.findall(r"^Listen=(?:\S*:)?(\d+) \(Stream\)$", unit, re.M)}


def process(pid):
    folder = Path(f"/proc/{pid}")
    try:
        return folder.stat().st_uid, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # the process has ended
        return None


if __name__ == "__main__":
    main()
