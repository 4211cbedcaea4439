"""Drains a node: it accepts no more work, and its running work ends."""

from __future__ import annotations

import time
from typing import Any

import ray

from llm_ray.errors import ClusterError
from llm_ray.operations.state import nodes

_POLL = 0.5


def drain(address: str, seconds: int) -> dict[str, Any]:
    """Drains the node at `address` and waits until it is idle, which ends its Ray. Raises ClusterError if the node is
    the head or refuses.

    In the result, `node` says whether there was such a node, and `drained` whether its work ended within `seconds`.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    began = time.monotonic()
    leaving = next((node for node in nodes() if node["address"] == address), None)
    if leaving is None:
        return {"node": False, "drained": True, "seconds": 0.0}
    if leaving["head"]:
        raise ClusterError(f"{address} is the head, which cannot leave the cluster")
    # The only one of Ray's two reasons that a busy node accepts.
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = time.time_ns() // 1_000_000 + seconds * 1000
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = gcs.drain_node(leaving["id"], reason, "leaves the cluster", deadline)
    if not accepted:
        raise ClusterError(f"{address} does not drain: {why}")
    while time.monotonic() - began < seconds:
        if not any(node["id"] == leaving["id"] for node in nodes()):
            return {"node": True, "drained": True, "seconds": round(time.monotonic() - began, 1)}
        time.sleep(_POLL)
    return {"node": True, "drained": False, "seconds": round(time.monotonic() - began, 1)}
