"""Finds problems and possible improvements of this host and its environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_ray.cluster import join_cluster
from llm_ray.doctor.collect import check_host
from llm_ray.doctor.finding import LEVELS, Finding, Level
from llm_ray.doctor.nodes import check_nodes
from llm_ray.errors import ClusterError
from llm_ray.progress import Reporter

__all__ = ["LEVELS", "Finding", "Level", "doctor", "worst"]


def doctor(home: Path, environment: Mapping[str, str], reporter: Reporter, address: str | None = None) -> list[Finding]:
    """Checks this host, and with a cluster's `address` its other nodes too; returns the findings of all checks by
    group.

    `environment` holds the variables that the commands run with. Ray, torch and the engines are imported in separate
    processes; a missing or broken package and an unreachable cluster are reported as findings.
    """
    reporter.line("Checking this host; importing torch, Ray and the engines takes some seconds.")
    return check_host(home, environment, _serving(home)) + (_cluster(address, reporter) if address else [])


def _cluster(address: str, reporter: Reporter) -> list[Finding]:
    reporter.line(f"Checking the nodes of the cluster ({address}).")
    try:
        with join_cluster(address):
            return check_nodes()
    except ImportError as error:
        text, fix = f"not checked, since Ray does not import: {error}", "what mends Ray, above"
    except ClusterError as error:
        text, fix = str(error), "ansible-playbook -i INVENTORY status.yml; llm-ray doctor on the node itself"
    return [Finding("Cluster", "nodes", "problem", text, fix)]


def worst(findings: list[Finding]) -> Level:
    return max((one.level for one in findings), key=LEVELS.index, default="ok")


def _serving(home: Path) -> set[int]:
    """Returns the process ids of this machine's serving Ray."""
    import psutil

    from llm_ray.serve.deployments import local

    found = local.running(home)
    if found is None:
        return set()
    try:
        process = psutil.Process(found.pid)
        return {found.pid, *(child.pid for child in process.children(recursive=True))}
    except psutil.NoSuchProcess:  # it ended meanwhile
        return set()
