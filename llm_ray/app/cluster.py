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
    """A cluster and what it serves, at one moment."""

    state: State
    serving: serving.Status
    rooms: list[Room]
    """The nodes with what is free, for `serving.check_room`."""
    models_on: dict[str, list[str]]
    """The models with replicas on each node, by node id."""


def cluster_state(home: Path, reporter: Reporter, address: str | None = None) -> State | None:
    """What the cluster at `address` has and does, or without one the Ray that serves on this machine; None where none
    does.

    Raises ClusterError.
    """
    if not address and local.running(home) is None:
        return None
    with joined(home, reporter, address):
        return state()


def overview(home: Path, reporter: Reporter, address: str | None = None) -> Overview:
    """All of it at once. Raises ServeError where nothing serves on this machine, ClusterError."""
    with joined(home, reporter, address):
        return Overview(state(), serving.status(home, reporter, address), deploy.nodes(), deploy.on_nodes())


def joined(home: Path, reporter: Reporter, address: str | None = None) -> AbstractContextManager[None]:
    """The connection that the other functions make for each call, kept for a block with several. Raises as
    `overview`."""
    return local.connected(ServeRuntime(mode="cluster", address=address) if address else ServeRuntime(), home, reporter)


def place(home: Path, address: str | None = None) -> object:
    """What `joined` would join, to be compared; None where nothing serves."""
    return address or local.running(home)


def drain(node: str, seconds: int, home: Path, reporter: Reporter, address: str | None = None) -> dict[str, Any]:
    """Have the node with the address `node` take no more work, and wait until it is idle, which ends its Ray: see
    operations.drain.

    Raises ClusterError for the head, and where the node refuses.
    """
    from llm_ray.operations.drain import drain as drain_node

    with joined(home, reporter, address):
        reporter.line(
            f"Draining {node}: it accepts no more work, and leaves when its running work has ended, after at most "
            f"{seconds} s."
        )
        return drain_node(node, seconds)
