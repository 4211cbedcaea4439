"""Filters that pass the inventory to a conf: addresses by host and group name, and cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def ray_job_names(addresses: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Returns addresses of Ray nodes by the names of hosts, and of groups that contain any; a host without a known
    address keeps its name."""
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
    """Returns the cores that the host gives to Ray; 0 if its facts are missing."""
    wanted = str(host.get("ray_node_cpus", "auto"))
    if wanted.isdigit():
        return int(wanted)
    return int((host.get("ansible_facts") or {}).get("processor_vcpus") or 0)


def ray_job_unknown(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """Returns hosts whose cores are unknown."""
    return [host for host in hosts if not ray_job_cpus(hostvars[host])]


def ray_job_reason(text: str, message: str) -> str:
    """Returns why a job failed, from the end of its output: the command's own error, else Ray's message."""
    lines = text.splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith(("Error: ", "Usage: "))]
    return "\n".join(lines[begins[-1] :]) if begins else "\n".join(lines[-3:]) or message.strip().split("\n")[-1]


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "ray_job_names": ray_job_names,
            "ray_job_cpus": ray_job_cpus,
            "ray_job_unknown": ray_job_unknown,
            "ray_job_reason": ray_job_reason,
        }
