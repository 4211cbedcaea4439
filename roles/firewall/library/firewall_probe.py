#!/usr/bin/python
"""Finds ports of a host that are reachable from this machine but should not be. It only connects, and sends nothing."""

from __future__ import annotations

import ipaddress
import re
import socket
from concurrent.futures import ThreadPoolExecutor

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: firewall_probe
short_description: Find reachable ports of a host that should be closed
description: Connects to the ports on which a host listens and that should be closed to this machine, if this machine is outside the cluster.
author: LLM on Ray
options:
  addresses: {description: Addresses of the host., type: list, elements: str, required: true}
  open_port: {description: "An open port, to tell whether the host is reachable at all.", type: int, required: true}
  listening: {description: "Lines of ss -Hltn on the host.", type: list, elements: str, required: true}
  cluster_ports: {description: "Ports, or from-to, open only to the cluster.", type: list, elements: str, required: true}
  served_ports: {description: "Ports, or from-to, open to the cluster and the admin networks.", type: list, elements: str, required: true}
  ssh_ports: {description: "Ports of SSH, which are open.", type: list, elements: int, required: true}
  cluster: {description: Addresses of the cluster., type: list, elements: str, required: true}
  admin: {description: Networks that may reach the served ports., type: list, elements: str, required: true}
  nfs: {description: Networks that may reach NFS., type: list, elements: str, required: true}
  timeout: {description: Seconds to wait for an answer., type: float, default: 3}
"""
EXAMPLES = """
- firewall_probe: {addresses: [10.0.0.11], open_port: 22, listening: [], cluster_ports: ['6379'], served_ports: ['8000'], ssh_ports: [22],
                   cluster: [], admin: [], nfs: []}
"""
RETURN = """
unknown: {description: Why it cannot be checked; empty if it can., type: str, returned: always}
source: {description: This machine's address as seen by the host., type: str, returned: always}
tried: {description: Ports that were tried., type: list, returned: always}
open: {description: "Reachable addresses and ports, such as 10.0.0.11:6379.", type: list, returned: always}
"""

_NFS = 2049


def main():
    lists = ("addresses", "listening", "cluster_ports", "served_ports", "cluster", "admin", "nfs")
    arguments = {name: {"type": "list", "elements": "str", "required": True} for name in lists}
    arguments |= {"ssh_ports": {"type": "list", "elements": "int", "required": True}}
    arguments |= {"open_port": {"type": "int", "required": True}, "timeout": {"type": "float", "default": 3}}
    module = AnsibleModule(arguments, supports_check_mode=True)
    module.exit_json(changed=False, **probe(module.params))


def probe(asked):
    found = {"unknown": "", "source": "", "tried": [], "open": []}
    reached = [address for address in asked["addresses"] if connects(address, asked["open_port"], asked["timeout"])]
    if not reached:
        return found | {
            "unknown": f"this machine does not reach port {asked['open_port']} of the host directly: scan its ports "
            "from one that does"
        }
    found["source"] = source = own_address(reached[0])
    if source in asked["addresses"] or within(source, asked["cluster"]) or ipaddress.ip_address(source).is_loopback:
        return found | {"unknown": f"this machine ({source}) is in the cluster: run validate.yml from a host outside"}
    served = [] if within(source, asked["admin"]) else asked["served_ports"]
    open_to_it = {*asked["ssh_ports"]} | ({_NFS} if within(source, asked["nfs"]) else set())
    found["tried"] = sorted(
        port for port in listening(asked["listening"]) - open_to_it if among(port, asked["cluster_ports"] + served)
    )
    targets = [(address, port) for address in reached for port in found["tried"]]
    with ThreadPoolExecutor(max(1, min(64, len(targets)))) as pool:
        answers = list(pool.map(lambda target: connects(target[0], target[1], asked["timeout"]), targets))
    found["open"] = [f"{address}:{port}" for (address, port), answer in zip(targets, answers) if answer]  # noqa: B905
    return found


def listening(lines):
    """Returns the ports on which a host listens beyond loopback."""
    ports = set()
    for line in lines:
        match = re.match(r"\S+\s+\d+\s+\d+\s+(\S+):(\d+)\s", line)
        if match and not match[1].strip("[]").startswith(("127.", "::1", "::ffff:127.")):
            ports.add(int(match[2]))
    return ports


def among(port, ranges):
    for text in ranges:
        low, _, high = str(text).partition("-")
        if int(low) <= port <= int(high or low):
            return True
    return False


def within(address, networks):
    own = ipaddress.ip_address(address)
    return any(own in ipaddress.ip_network(network, strict=False) for network in networks)


def connects(address, port, timeout):
    try:
        socket.create_connection((address, port), timeout).close()
    except OSError:
        return False
    return True


def own_address(address):
    """Returns this machine's address as seen by a host."""
    family = socket.getaddrinfo(address, 22)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe_socket:
        probe_socket.connect((address, 22))
        return probe_socket.getsockname()[0]


if __name__ == "__main__":
    main()
