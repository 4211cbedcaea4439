"""Findings about a cluster, from what its nodes said."""

from __future__ import annotations

from llm_ray.operations.checks import node_findings, storage_findings, version_findings

INVENTORY = {"head": "10.0.0.1", "w1": "10.0.0.2", "w2": "10.0.0.3"}


def _failed(findings: list[dict[str, str]]) -> dict[str, str]:
    assert all(one["fix"] for one in findings if one["result"] == "failed")
    return {one["host"]: one["found"] for one in findings if one["result"] == "failed"}


def test_nodes_against_the_inventory() -> None:
    node = {"host": "x", "draining": False, "cpus": 2.0, "memory_gib": 4.0}
    alive = {"10.0.0.1": node, "10.0.0.2": node | {"draining": True}, "10.0.0.9": node | {"host": "stranger"}}
    findings = node_findings(INVENTORY, alive)
    assert _failed(findings) == {
        "w1": "draining: it accepts no more work",
        "w2": "not in the cluster (10.0.0.3)",
        "stranger": "10.0.0.9 is in the cluster but not in the inventory",
    }
    assert findings[0] == {
        "check": "node",
        "host": "head",
        "result": "passed",
        "found": "alive, 2 CPUs, 4.0 GiB",
        "fix": "",
    }


def test_versions_against_the_heads() -> None:
    same = {"python": "3.11.2", "ray": "2.60.0"}
    findings = version_findings({"head": same, "w1": dict(same), "w2": same | {"python": "3.11.7"}})
    assert _failed(findings) == {"w2": "python 3.11.7 where head has 3.11.2"}


def test_storage_that_is_not_shared_or_not_writable() -> None:
    findings = storage_findings(
        {"head": "", "w1": "Permission denied", "w2": ""}, {"head": ["w2"], "w1": [], "w2": "a task failed: x"}
    )
    assert _failed(findings) == {
        "head": "does not see files written on w2",
        "w1": "cannot write: Permission denied",
        "w2": "cannot read: a task failed: x",
    }
