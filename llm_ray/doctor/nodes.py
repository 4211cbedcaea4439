"""Checks each node of the connected Ray, and whether the nodes match."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import llm_ray
from llm_ray.conf.section import home
from llm_ray.doctor import software
from llm_ray.doctor.finding import Finding
from llm_ray.errors import ClusterError
from llm_ray.host import rules

_GROUP = "Cluster"
_SECONDS = 600  # for all checks of a node, which import torch, Ray and the engines


@dataclass(frozen=True)
class Node:
    """A node's software versions and clock skew against this host."""

    host: str
    versions: Mapping[str, str | None]
    """Versions of llm-ray, Python and packages; None for a missing package."""
    skew: float
    """Lower bound, in seconds."""


def check_nodes() -> list[Finding]:
    """Checks every other node of the connected Ray, and compares all nodes. Raises ClusterError if a node does not
    answer or its llm-ray lacks these checks."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    alive = _names([node for node in ray.nodes() if node["Alive"]])

    def on(node: str, function: Callable[[], Any]) -> Any:
        task = ray.remote(function).options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        return task.remote()

    def answers(asked: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for node, task in asked.items():
            try:
                found[node] = ray.get(task, timeout=_SECONDS)
            except ray.exceptions.RayError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise ClusterError(
                    f"{alive[node]} cannot be checked: {reason}. Is its llm-ray as this one ({llm_ray.__version__})? "
                    "upgrade.yml brings all nodes to one version"
                ) from error
        return found

    answers({node: on(node, _who) for node in alive})  # starts the workers first, for prompt clock readings
    nodes = []
    for node, host in alive.items():
        before = time.time()
        versions, now = answers({node: on(node, _who)})[node]
        nodes.append(Node(host, versions, rules.clock_skew(before, now, time.time())))
    others = answers({node: on(node, _check) for node in alive if node != here})
    return compare(nodes) + [
        replace(finding, host=alive[node]) for node, findings in others.items() for finding in findings
    ]


def compare(nodes: Sequence[Node]) -> list[Finding]:
    """Reports differences between nodes: versions and clocks."""
    found = []
    names = [*dict.fromkeys(name for node in nodes for name in node.versions)]
    for name in names:
        by_host = {node.host: node.versions.get(name) for node in nodes}
        common = Counter(by_host.values()).most_common(1)[0][0]
        if odd := [f"{version or 'missing'} on {host}" for host, version in by_host.items() if version != common]:
            text = f"{common or 'missing'} on most nodes, but {', '.join(odd)}"
            fix = "ansible-playbook -i INVENTORY upgrade.yml"
            found.append(Finding(_GROUP, name, "problem", text, fix, by_host))
    if not found:
        text = f"the same on {len(nodes)} node(s): {', '.join(node.host for node in nodes)}"
        found.append(Finding(_GROUP, "versions", "ok", text, values=dict(nodes[0].versions)))
    skews = {node.host: round(node.skew, 1) for node in nodes}
    if late := [f"{host} {skew:g} s" for host, skew in skews.items() if skew > rules.MAX_CLOCK_SKEW]:
        text = f"off this host's: {', '.join(late)}; {rules.MAX_CLOCK_SKEW} s are allowed"
        found.append(Finding(_GROUP, "clocks", "problem", text, "timedatectl set-ntp true on these hosts", skews))
    else:
        found.append(Finding(_GROUP, "clocks", "ok", f"within {rules.MAX_CLOCK_SKEW} s", values=skews))
    return found


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns node names by id: the host name, with address and port if several nodes share it."""
    counts = Counter(node["NodeManagerHostname"] for node in nodes)
    return {
        node["NodeID"]: name
        if counts[name := node["NodeManagerHostname"]] == 1
        else f"{name} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})"
        for node in nodes
    }


def _who() -> tuple[dict[str, str | None], float]:
    """Returns versions and time of the node that runs this function."""
    have = software.installed()
    versions = {"llm-ray": llm_ray.__version__, "Python": platform.python_version()}
    return {**versions, **{name: have.get(name) for name in software.PACKAGES}}, time.time()


def _check() -> list[Finding]:
    """Runs all checks on the node that runs this function."""
    from llm_ray.doctor.collect import check_host

    return check_host(home(), os.environ)
