"""A cluster's resources and activity, as reported by Ray."""

from __future__ import annotations

import time
from typing import TypedDict

import ray

_GIB = 2**30


class Node(TypedDict):
    """A live node: `id` is Ray's; CPUs, memory and object store are given as total and used."""

    id: str
    host: str
    address: str
    head: bool
    draining: bool
    cpus: float
    cpus_used: float
    memory_gib: float
    memory_gib_used: float
    object_store_gib: float
    object_store_gib_used: float


class Job(TypedDict):
    """A submitted job or connected program. `since` is in the host's local time, to the minute."""

    id: str
    status: str
    since: str
    command: str


class Application(TypedDict):
    """An application on Ray Serve; `replicas` counts the running ones."""

    name: str
    status: str
    replicas: int
    message: str


class State(TypedDict):
    """A cluster; `ray` is its Ray version."""

    ray: str
    nodes: list[Node]
    jobs: list[Job]
    applications: list[Application]


def state() -> State:
    """Returns nodes with resources, unfinished jobs, and served applications of the connected Ray."""
    return {"ray": ray.__version__, "nodes": nodes(), "jobs": _jobs(), "applications": _applications()}


def nodes() -> list[Node]:
    """Returns the live nodes by host name: address, whether they drain, and total and used CPUs, memory and object
    store (GiB)."""
    from ray._private.state import available_resources_per_node
    from ray._private.state import state as ray_state

    free, draining = available_resources_per_node(), ray_state.get_draining_nodes()
    found: list[Node] = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        all_of, left = node["Resources"], free.get(node["NodeID"], {})
        found.append(
            {
                "id": node["NodeID"],
                "host": node["NodeManagerHostname"],
                "address": node["NodeManagerAddress"],
                "head": "node:__internal_head__" in all_of,
                "draining": node["NodeID"] in draining,
                "cpus": all_of.get("CPU", 0),
                "cpus_used": round(all_of.get("CPU", 0) - left.get("CPU", 0), 2),
                "memory_gib": round(all_of.get("memory", 0) / _GIB, 1),
                "memory_gib_used": round((all_of.get("memory", 0) - left.get("memory", 0)) / _GIB, 1),
                "object_store_gib": round(all_of.get("object_store_memory", 0) / _GIB, 2),
                "object_store_gib_used": round(
                    (all_of.get("object_store_memory", 0) - left.get("object_store_memory", 0)) / _GIB, 2
                ),
            }
        )
    return sorted(found, key=lambda node: (not node["head"], node["host"]))


def _jobs() -> list[Job]:
    """Returns submitted jobs and connected programs except this one. Without a dashboard no jobs can be submitted."""
    from ray._private.services import get_webui_url_from_internal_kv
    from ray.util.state import list_jobs

    if not get_webui_url_from_internal_kv():
        return []

    own = ray.get_runtime_context().get_job_id()
    return [
        {
            "id": job.submission_id or job.job_id,
            "status": job.status,
            "since": time.strftime("%Y-%m-%d %H:%M", time.localtime(job.start_time / 1000)) if job.start_time else "",
            "command": job.entrypoint,
        }
        for job in list_jobs(limit=1000)
        if job.status in ("PENDING", "RUNNING") and job.job_id != own
    ]


def _applications() -> list[Application]:
    from ray import serve
    from ray.serve.context import _get_global_client

    if _get_global_client(raise_if_no_controller_running=False) is None:
        return []
    return [
        {
            "name": name,
            "status": str(app.status.value),
            "replicas": sum(deployment.replica_states.get("RUNNING", 0) for deployment in app.deployments.values()),
            "message": app.message,
        }
        for name, app in sorted(serve.status().applications.items())
    ]
