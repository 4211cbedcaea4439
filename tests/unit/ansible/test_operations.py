"""What the playbooks decide by themselves: names that may be meant, what a failed check says, which ports are open."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from jinja2 import StrictUndefined

from tests.unit.ansible.conftest import ROOT, load, playbook

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


@pytest.fixture(scope="module")
def spelling() -> ModuleType:
    return load("playbooks/lookup_plugins/operations_misspelt.py")


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


def test_a_misspelt_argument_is_told_and_names_of_something_else_are_not(spelling: ModuleType) -> None:
    names = ("rollbak", "Rollback", "node", "ray_node_drain_seconds", "rollbacks")
    known = spelling.variables_of_roles() | {"rollbacks"}
    assert spelling.misspelt(names, ["rollback", "drain_seconds"], known.__contains__) == [
        "-e Rollback: no such argument: did you mean -e rollback=…?",
        "-e rollbak: no such argument: did you mean -e rollback=…?",
    ]


def test_keys_of_a_conf_and_variables_of_its_template_are_no_misspelt_arguments(
    spelling: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text("name: {{ questions }}")
    given = ["models", "questions", "models.chat.cpus", "quesiton"]
    assert spelling.misspelt(
        given, ["model", "question"], spelling.names_of_conf("serve", str(tmp_path / "own.yaml"))
    ) == ["-e quesiton: no such argument: did you mean -e question=…?"]
    assert not spelling.names_of_conf("serve", str(tmp_path / "nowhere.yaml"))("questions")


def test_only_what_is_given_by_e_may_be_misspelt(tmp_path: Path) -> None:
    play = {"hosts": "localhost", "gather_facts": False, "vars": {"config": 1, "nodes": 2, "mode": 3, "note": 4}}
    arguments = {"__arguments": ["conf", "node", "model"], "__arguments_kind": "serve", "__arguments_conf": "cluster"}
    tasks = [{"include_tasks": str(ROOT / "playbooks/tasks/arguments.yml"), "vars": arguments}]
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play | {"tasks": tasks}]))
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "ANSIBLE_LOOKUP_PLUGINS": str(ROOT / "playbooks/lookup_plugins"),
    }
    command = [str(Path(sys.executable).parent / "ansible-playbook"), str(tmp_path / "play.yml")]
    for given, code in (("models={}", 0), ("modle=x", 2)):
        done = subprocess.run(
            [*command, "-e", given], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == code, done.stdout
    assert "-e modle: no such argument: did you mean -e model=…?" in done.stdout


def test_a_failed_check_says_what_is_wrong_and_what_to_do(operations: ModuleType) -> None:
    told = {"msg": "w1: the unit is inactive: site.yml starts it", "assertion": "x", "failed": True}
    (row,) = operations.operations_failed(told, "ray_node", "w1")
    assert row == {
        "check": "ray_node",
        "host": "w1",
        "result": "failed",
        "found": "the unit is inactive",
        "fix": "site.yml starts it",
    }
    each = {
        "results": [
            {"failed": False},
            {"failed": True, "stderr": "first\nnft: no such table", "msg": "non-zero return code"},
        ]
    }
    (row,) = operations.operations_failed(each, "firewall", "w1")
    assert row["found"] == "nft: no such table"
    assert row["fix"] == "repair it with ansible-playbook site.yml --limit w1"


def test_a_cluster_that_fails_ends_validate_with_1_and_one_that_cannot_be_judged_with_2(
    tmp_path: Path, closed: int
) -> None:
    inventory = {"ray_head": {"hosts": {"head": {"ansible_host": "127.0.0.1", "ansible_port": closed}}}}
    report, others = tmp_path / "report.json", tmp_path / "junit"
    environment = {"HOME": str(tmp_path), "ANSIBLE_CALLBACKS_ENABLED": "junit", "JUNIT_OUTPUT_DIR": str(others)}
    for given, code in ((f"validate_report={report}", 1), ("validate_reprot=x", 2)):
        done = playbook(tmp_path, inventory, "-e", given, name="validate.yml", **environment)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    told = json.loads(report.read_text())
    assert told["failed"] == 1
    assert told["findings"][0]["found"].startswith("not reached: Failed to connect")
    assert len(list(others.iterdir())) == 2  # a callback of the user's own has been told the end, too
    assert list((tmp_path / ".ansible/tmp").iterdir()) == []


def test_an_answer_is_its_last_line_or_why_there_is_none(operations: ModuleType) -> None:
    assert operations.operations_answer({"stdout": 'noise\n[{"check": "node"}]\n', "rc": 0}) == [{"check": "node"}]
    assert operations.operations_answer({"stdout": "", "stderr": "Traceback\nModuleNotFoundError: llm_ray"}) == {
        "error": "ModuleNotFoundError: llm_ray"
    }
    assert operations.operations_answer({"stdout": "", "rc": 124, "cmd": ["timeout", "600"]}) == {
        "error": "no answer within 600 s"
    }


def test_addresses_are_those_of_the_facts_unless_one_is_set(operations: ModuleType) -> None:
    facts = {"default_ipv4": {"address": "10.0.0.1"}}
    hostvars = {
        "a": {"ansible_facts": facts},
        "b": {"ansible_facts": facts, "ray_node_address": "10.1.0.1"},
        "c": {"ansible_host": "10.0.0.3"},
        "d": {"ansible_host": "10.0.0.4", "ray_node_address": "10.1.0.4"},  # it has no default route
        "e": {"ansible_host": "10.0.0.5", "ray_node_address": StrictUndefined()},  # comes of facts that are not known
    }
    assert operations.cluster_addresses(hostvars, [*hostvars]) == {
        "a": "10.0.0.1", "b": "10.1.0.1", "c": "10.0.0.3", "d": "10.1.0.4", "e": "10.0.0.5",
    }  # fmt: skip


def test_a_host_that_was_not_asked_is_not_said_to_be_away(operations: ModuleType) -> None:
    away = {"__status_units": {"results": [{"unreachable": True}]}}
    assert operations.operations_units({"w1": {}, "w2": away}, ["w1", "w2"]) == [
        {"host": "w1", "state": "left out by --limit"},
        {"host": "w2", "state": "the host is not reached"},
    ]


def test_a_table_lines_up(operations: ModuleType) -> None:
    assert operations.operations_table([{"a": "long one", "b": 1}], ["a", "b"]) == "a         b\nlong one  1"


@pytest.fixture
def closed() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


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
    asked |= {"cluster_ports": [str(port)], "served_ports": [], "ssh_ports": [22], "nfs": []}
    return asked | {"cluster": ["10.0.0.1"], "admin": []} | more


def test_an_open_port_is_found_from_outside(probe: ModuleType, listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "own_address", lambda _: "192.0.2.7")
    assert probe.probe(_asked(listener))["open"] == [f"127.0.0.1:{listener}"]
    served = {"cluster_ports": [], "served_ports": [str(listener)]}
    assert probe.probe(_asked(listener, **served))["open"] == [f"127.0.0.1:{listener}"]
    assert probe.probe(_asked(listener, **served, admin=["192.0.2.0/24"]))["open"] == []


def test_what_is_open_by_intention_is_not_tried(
    probe: ModuleType, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "own_address", lambda _: "192.0.2.7")
    listens = [f"LISTEN 0 1 *:{port} *:*" for port in (listener, 2049, 50022)]
    asked = _asked(listener, listening=listens, cluster_ports=["2049", "32768-60999"], ssh_ports=[22, 50022, listener])
    assert probe.probe(asked)["tried"] == [2049]
    assert probe.probe(asked | {"nfs": ["192.0.2.0/24"]})["tried"] == []


def test_it_says_when_it_cannot_judge(probe: ModuleType, listener: int, closed: int) -> None:
    assert "is in the cluster" in probe.probe(_asked(listener))["unknown"]
    assert "does not reach" in probe.probe(_asked(listener) | {"open_port": closed})["unknown"]
