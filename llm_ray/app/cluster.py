"""The cluster's current state: nodes, running jobs, served applications."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.app import serving
from llm_ray.conf.serve import ServeRuntime
from llm_ray.operations.state import Application, Job, Node, State, state
from llm_ray.progress import Reporter
from llm_ray.serve.deployments import deploy, local
from llm_ray.serve.deployments.plan import Node as Room

__all__ = [
    "Application",
    "Job",
    "Node",
    "Overview",
    "Room",
    "State",
    "cluster_state",
    "drain",
    "joined",
    "overview",
    "place",
]


@dataclass(frozen=True)
class Overview:
    """A snapshot of a cluster and what it serves."""

    state: State
    serving: serving.Status
    rooms: list[Room]
    """The nodes with their free resources, for `serving.estimate`."""
    models_on: dict[str, list[str]]
    """Names of the models with replicas on each node, by node id."""


def cluster_state(home: Path, reporter: Reporter, address: str | None = None) -> State | None:
    """Returns the state of the cluster at `address`, or without an address that of the local Ray that serves; None if
    no local Ray serves.

    Raises ClusterError.
    """
    if not address and local.running(home) is None:
        return None
    with joined(home, reporter, address):
        return state()


def overview(home: Path, reporter: Reporter, address: str | None = None) -> Overview:
    """Returns the state and the deployments together. Raises ServeError if nothing serves on this machine, and
    ClusterError."""
    with joined(home, reporter, address):
        return Overview(state(), serving.status(home, reporter, address), deploy.nodes(), deploy.on_nodes())


def joined(home: Path, reporter: Reporter, address: str | None = None) -> AbstractContextManager[None]:
    """Keeps the connection that the other functions open per call open for a block with several calls. Raises the same
    errors as `overview`."""
    return local.connected(ServeRuntime(mode="cluster", address=address) if address else ServeRuntime(), home, reporter)


def place(home: Path, address: str | None = None) -> object:
    """Returns an identifier of the Ray that `joined` would connect to, for comparison; None if no local Ray serves."""
    return address or local.running(home)


def drain(node: str, seconds: int, home: Path, reporter: Reporter, address: str | None = None) -> dict[str, Any]:
    """Drains the node with the address `node`: it takes no more work, and its Ray ends once it is idle. Waits for that
    at most `seconds`; see operations.drain for the result.

    Raises ClusterError for the head node, and if the node refuses.
    """
    from llm_ray.operations.drain import drain as drain_node

    with joined(home, reporter, address):
        reporter.line(
            f"Draining {node}: it accepts no more work, and leaves when its running work has ended, after at most "
            f"{seconds} s."
        )
        return drain_node(node, seconds)
