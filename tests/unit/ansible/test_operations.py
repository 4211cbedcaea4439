"""What the playbooks decide by themselves: names that may be meant, what a failed check says, which ports are open."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.unit.ansible.conftest import load

GROUPS = {
    "all": ["head", "w1", "w2", "nas"],
    "ray_head": ["head"],
    "ray_workers": ["w1", "w2", "nas"],
    "nfs_server": ["nas"],
    "rack": ["w1"],
}


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return load("roles/firewall/library/firewall_probe.py")


@pytest.mark.parametrize("verb", ["added", "removed"])
def test_a_worker_by_its_name_may_be_meant(operations: ModuleType, verb: str) -> None:
    assert operations.operations_node("w1", GROUPS, verb) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "node is not given: name one worker: -e node=w1; the workers are w1, w2, nas"),
        ("head", "node = head: the head is not removed: reset.yml takes a cluster away"),
        ("all", "node = all: one host alone is removed"),
        ("rack", "node = rack: one host alone is removed"),
        ("w1,w2", "node = w1,w2: one host alone is removed"),
        ("w*", "node = w*: one host alone is removed"),
        (["w1", "w2"], "node = ['w1', 'w2']: one host alone is removed"),
        ("nass", "node = nass: not in the group ray_workers of the inventory: did you mean nas?"),
        ("other", "node = other: not in the group ray_workers of the inventory: the workers are w1, w2, nas"),
        ("nas", "node = nas: it holds the shared storage: move nfs_server to another host first"),
    ],
)
def test_no_other_name_may_be_removed(operations: ModuleType, name: object, said: str) -> None:
    assert operations.operations_node(name, GROUPS, "removed").startswith(said)


def test_a_misspelt_argument_is_told_and_variables_of_roles_are_not(operations: ModuleType, roles: str) -> None:
    names = ("rollbak", "Rollback", "node", "ray_node_drain_seconds", "groups", "playbook_dir")
    assert operations.operations_misspelt(dict.fromkeys(names), ["rollback", "drain_seconds"], roles) == [
        "-e Rollback: no such argument: did you mean -e rollback=…?",
        "-e rollbak: no such argument: did you mean -e rollback=…?",
    ]


def test_a_failed_check_says_what_is_wrong_and_what_to_do(operations: ModuleType) -> None:
    told = {"msg": "w1: the unit is inactive: site.yml starts it", "assertion": "x", "failed": True}
    (row,) = operations.operations_failed(told, "ray_node", "w1")
    assert row == {"check": "ray_node", "host": "w1", "result": "failed", "found": "the unit is inactive", "fix": "site.yml starts it"}
    each = {"results": [{"failed": False}, {"failed": True, "stderr": "first\nnft: no such table", "msg": "non-zero return code"}]}
    (row,) = operations.operations_failed(each, "firewall", "w1")
    assert row["found"] == "nft: no such table"
    assert row["fix"] == "ansible-playbook site.yml --limit w1 heals it"


def test_an_answer_is_its_last_line_or_why_there_is_none(operations: ModuleType) -> None:
    assert operations.operations_answer({"stdout": 'noise\n[{"check": "node"}]\n', "rc": 0}) == [{"check": "node"}]
    assert operations.operations_answer({"stdout": "", "stderr": "Traceback\nModuleNotFoundError: llm_ray"}) == {
        "error": "ModuleNotFoundError: llm_ray"
    }
    assert operations.operations_answer({"stdout": "", "rc": 124, "cmd": ["timeout", "600"]}) == {"error": "no answer within 600 s"}


def test_addresses_are_those_of_the_facts_unless_one_is_set(operations: ModuleType) -> None:
    facts = {"default_ipv4": {"address": "10.0.0.1"}}
    hostvars = {
        "a": {"ansible_facts": facts},
        "b": {"ansible_facts": facts, "ray_node_address": "10.1.0.1"},
        "c": {"ansible_host": "10.0.0.3"},
    }
    assert operations.operations_addresses(hostvars, ["a", "b", "c"]) == {"a": "10.0.0.1", "b": "10.1.0.1", "c": "10.0.0.3"}


def test_a_table_lines_up(operations: ModuleType) -> None:
    assert operations.operations_table([{"a": "long one", "b": 1}], ["a", "b"]) == "a         b\nlong one  1"


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


LISTENING = [
    "LISTEN 0 128          0.0.0.0:22         0.0.0.0:*",
    "LISTEN 0 511        127.0.0.1:8265       0.0.0.0:*",
    "LISTEN 0 4096      10.0.0.1%eth0:6379    0.0.0.0:*",
    "LISTEN 0 4096               *:52365            *:*",
    "LISTEN 0 4096 [::ffff:127.0.0.1]:6381          *:*",
    "LISTEN 0 4096            [::]:20001         [::]:*",
]


def test_what_listens_beyond_loopback(probe: ModuleType) -> None:
    assert probe.listening(LISTENING) == {22, 6379, 52365, 20001}
    assert [port for port in (22, 6379, 20001, 22000) if probe.among(port, ["6379", "20000-21999"])] == [6379, 20001]


def _asked(port: int, **more: object) -> dict[str, object]:
    asked = {"addresses": ["127.0.0.1"], "open_port": port, "listening": [f"LISTEN 0 1 *:{port} *:*"], "timeout": 1}
    return asked | {"cluster_ports": [str(port)], "served_ports": [], "cluster": ["10.0.0.1"], "admin": []} | more


def test_an_open_port_is_found_from_outside(probe: ModuleType, listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "own_address", lambda _: "192.0.2.7")
    assert probe.probe(_asked(listener))["open"] == [f"127.0.0.1:{listener}"]
    served = {"cluster_ports": [], "served_ports": [str(listener)]}
    assert probe.probe(_asked(listener, **served))["open"] == [f"127.0.0.1:{listener}"]
    assert probe.probe(_asked(listener, **served, admin=["192.0.2.0/24"]))["open"] == []


def test_it_says_when_it_cannot_judge(probe: ModuleType, listener: int) -> None:
    assert "is in the cluster" in probe.probe(_asked(listener))["unknown"]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "does not reach" in probe.probe(_asked(listener) | {"open_port": port})["unknown"]
