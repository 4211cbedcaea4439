"""Whether the nodes of a cluster go together."""

from __future__ import annotations

from llm_ray.doctor.nodes import Node, _names, compare

_VERSIONS = {"llm-ray": "0.2.0", "Python": "3.11.2", "ray": "2.60.0"}


def _node(n: int, skew: float = 0, **changed: str | None) -> Node:
    return Node(f"node{n}", _VERSIONS | changed, skew)


def test_nodes_that_are_alike() -> None:
    versions, clocks = compare([_node(1), _node(2, skew=1.2)])
    assert (versions.level, clocks.level) == ("ok", "ok")
    assert versions.text == "the same on 2 node(s): node1, node2"
    assert clocks.values == {"node1": 0, "node2": 1.2}


def test_nodes_that_differ() -> None:
    python, ray, clocks = compare([_node(1), _node(2, Python="3.11.4"), _node(3, skew=9.04, ray=None)])
    assert {python.level, ray.level, clocks.level} == {"problem"}
    assert (python.check, python.text) == ("Python", "3.11.2 on most nodes, but 3.11.4 on node2")
    assert (ray.check, ray.text) == ("ray", "2.60.0 on most nodes, but missing on node3")
    assert "upgrade.yml" in python.fix
    assert clocks.text == "off this host's: node3 9 s; 5 s are allowed"
    assert "set-ntp true" in clocks.fix


def test_nodes_with_one_host_name_are_told_apart() -> None:
    nodes = [
        {"NodeID": str(n), "NodeManagerHostname": name, "NodeManagerAddress": f"10.0.0.{n}", "NodeManagerPort": 40}
        for n, name in enumerate(("a", "b", "b"))
    ]
    assert _names(nodes) == {"0": "a", "1": "b (10.0.0.1:40)", "2": "b (10.0.0.2:40)"}
