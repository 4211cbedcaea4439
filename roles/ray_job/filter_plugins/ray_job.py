"""What a conf is told of the inventory: addresses by the names of hosts and groups, and cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def ray_job_names(addresses: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Addresses of Ray's nodes by the names of hosts, and of groups that hold any; a host of unknown address keeps its
    name."""
    addresses = {host: address or host for host, address in addresses.items()}
    by_group = {
        group: [addresses[host] for host in hosts if host in addresses]
        for group, hosts in groups.items()
        if group != "ungrouped"
    }
    return {group: found for group, found in by_group.items() if found} | {
        host: [address] for host, address in addresses.items()
    }


def ray_job_cpus(host: Mapping[str, Any]) -> int:
    """Cores that the host gives to Ray; 0 where its facts are not known."""
    wanted = str(host.get("ray_node_cpus", "auto"))
    if wanted.isdigit():
        return int(wanted)
    return int((host.get("ansible_facts") or {}).get("processor_vcpus") or 0)


def ray_job_unknown(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """Hosts whose cores are not known."""
    return [host for host in hosts if not ray_job_cpus(hostvars[host])]


def ray_job_reason(text: str, message: str) -> str:
    """Why a job failed, from the end of what it printed: the command's own error, else what Ray says."""
    lines = text.splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith(("Error: ", "Usage: "))]
    return "\n".join(lines[begins[-1] :]) if begins else "\n".join(lines[-3:]) or message.strip().split("\n")[-1]


class FilterModule:
    """What Ansible asks a filter plugin for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "ray_job_names": ray_job_names,
            "ray_job_cpus": ray_job_cpus,
            "ray_job_unknown": ray_job_unknown,
            "ray_job_reason": ray_job_reason,
        }
