"""Playbooks, run whole, against hosts that are not reached or only stand for one: what they refuse, what they touch,
what they say."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.unit.ansible.conftest import FACTS, ROOT, modules, playbook, stand_in

# Playbooks that ask or use the cluster, with what each cannot do without.
ASKING: list[tuple[str, list[str]]] = [
    ("validate.yml", []),
    ("status.yml", []),
    ("finetune.yml", ["-e", "conf=cluster"]),
    ("serve.yml", ["-e", "model=bot"]),
    ("serve_stop.yml", ["-e", "model=bot"]),
    ("ui.yml", []),
]


@pytest.fixture
def away() -> dict[str, Any]:
    """A host that nobody is at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return {"ansible_port": server.getsockname()[1]}


def cluster(head: dict[str, Any], **workers: dict[str, Any]) -> dict[str, Any]:
    hosts = {
        name: {"ansible_host": f"127.0.0.{n}"} | own
        for n, (name, own) in enumerate({"head": head, **workers}.items(), 1)
    }
    return {
        "ray_head": {"hosts": {"head": hosts.pop("head")}},
        "ray_workers": {"hosts": hosts},
        "nfs_server": {"hosts": {"head": {}}},
    }


def words(done: Any) -> str:
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("reached", [False, True], ids=["away", "without sudo"])
def test_a_worker_stays_whole_when_the_head_that_ends_its_work_is_of_no_use(
    tmp_path: Path, away: dict[str, Any], reached: bool
) -> None:
    refusing = stand_in(tmp_path, "head", setup={"failed": True, "msg": "sudo: a password is required"})
    inventory = cluster(refusing if reached else away, w1=stand_in(tmp_path, "w1"))
    done = playbook(tmp_path, inventory, "-e", "node=w1", name="remove_node.yml", HOME=str(tmp_path))
    assert done.returncode == 2, done.stdout
    assert "head is unreachable, but it must drain the node: nothing was changed" in words(done)
    assert modules(tmp_path, "w1") == ["setup", "stat"]


def test_a_worker_that_is_left_out_does_not_leave(tmp_path: Path, away: dict[str, Any]) -> None:
    done = playbook(
        tmp_path, cluster(away, w1=away, w2=away), "-e", "node=w1", "--limit", "head,w2", name="remove_node.yml"
    )
    assert done.returncode == 2, done.stdout
    assert "--limit leaves out w1: nothing was changed: run this without --limit" in words(done)


def test_no_worker_is_stripped_of_folders_that_are_others(tmp_path: Path, away: dict[str, Any]) -> None:
    done = playbook(
        tmp_path, cluster(away, w1=away | {"llm_ray_prefix": "/opt"}), "-e", "node=w1", name="remove_node.yml"
    )
    assert done.returncode == 2, done.stdout
    assert 'w1: llm_ray_prefix = "/opt": others keep files there, too' in words(done)
    assert "PLAY [Check which hosts are reachable]" not in done.stdout


@pytest.mark.parametrize("seconds", ["1h", ""])
def test_seconds_to_drain_are_a_number(tmp_path: Path, away: dict[str, Any], seconds: str) -> None:
    inventory = cluster(away, w1=away)
    done = playbook(tmp_path, inventory, "-e", "node=w1", "-e", f"drain_seconds={seconds}", name="remove_node.yml")
    assert done.returncode == 2, done.stdout
    assert f"drain_seconds = {seconds}: give seconds, such as -e drain_seconds=3600" in words(done)


def test_a_head_that_is_lost_while_it_is_asked_has_answered_so(tmp_path: Path, away: dict[str, Any]) -> None:
    tasks = [
        {"include_tasks": str(ROOT / "playbooks/tasks/ask.yml"), "vars": {"__ask": ["state"]}},
        {"debug": {"var": "__answer.error"}},
    ]
    play = {
        "hosts": "ray_head",
        "gather_facts": False,
        "vars_files": [str(ROOT / "playbooks/vars/cluster.yml")],
        "tasks": tasks,
    }
    (tmp_path / "ask.yml").write_text(yaml.safe_dump([play]))
    done = playbook(
        tmp_path,
        cluster(away),
        name=str(tmp_path / "ask.yml"),
        ANSIBLE_FILTER_PLUGINS=str(ROOT / "playbooks/filter_plugins"),
    )
    assert done.returncode == 0, done.stdout
    assert "__answer.error: 'Task failed: Failed to connect" in words(done)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *ASKING,
        ("remove_node.yml", ["-e", "node=w1"]),
        ("site.yml", ["--tags", "firewall"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misspelt_group_is_told_and_no_success(
    tmp_path: Path, away: dict[str, Any], name: str, arguments: list[str]
) -> None:
    inventory = cluster(away, w1=away)
    inventory["ray_heads"] = inventory.pop("ray_head")
    done = playbook(tmp_path, inventory, *arguments, name=name)
    assert done.returncode == 2, done.stdout
    assert "the group ray_heads means nothing here: did you mean ray_head?" in words(done)


def test_to_skip_preflight_skips_its_look_at_the_inventory_too(tmp_path: Path, away: dict[str, Any]) -> None:
    done = playbook(
        tmp_path,
        {"ray_heads": {"hosts": {"head": away}}},
        "--skip-tags",
        "preflight",
        "--tags",
        "firewall",
        name="site.yml",
    )
    assert done.returncode == 0, done.stdout
    assert "TASK [preflight : Verify the inventory]" not in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *ASKING,
        ("add_node.yml", ["-e", "node=w1"]),
        ("upgrade.yml", []),
        ("bundle.yml", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_done_without_the_head(
    tmp_path: Path, away: dict[str, Any], name: str, arguments: list[str]
) -> None:
    done = playbook(tmp_path, cluster(away, w1=away), *arguments, "--limit", "w1", name=name)
    assert done.returncode == 2, done.stdout
    assert "--limit leaves out head: nothing was changed: run this without --limit" in words(done)


def test_a_report_may_have_a_name_alone(tmp_path: Path, away: dict[str, Any]) -> None:
    done = playbook(tmp_path, cluster(away), "-e", "validate_report=report.json", name="validate.yml", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["findings"]


def test_a_head_that_cannot_be_looked_at_is_not_well(tmp_path: Path) -> None:
    head = stand_in(tmp_path, "head", setup={"failed": True, "msg": "sudo: a password is required"})
    report = tmp_path / "report.json"
    inventory = cluster(head, w1=stand_in(tmp_path, "w1"))
    done = playbook(tmp_path, inventory, "-e", f"validate_report={report}", "--skip-tags", "hosts", name="validate.yml")
    assert done.returncode == 1, done.stdout
    told = json.loads(report.read_text())
    assert told["ok"] is False
    assert [(one["host"], one["found"]) for one in told["findings"]] == [
        ("head", "not reached: sudo: a password is required")
    ]


def test_of_another_clusters_host_with_the_same_name_nothing_is_taken(tmp_path: Path, away: dict[str, Any]) -> None:
    others = cluster(stand_in(tmp_path, "head"), w1=stand_in(tmp_path, "w1"))
    one = [*("--tags", "none"), *("--skip-tags", "preflight")]
    assert playbook(tmp_path, others, *one, name="site.yml").returncode == 0
    done = playbook(tmp_path, cluster(away, w1=stand_in(tmp_path, "w1")), *one, "--limit", "w1", name="site.yml")
    assert done.returncode == 2, done.stdout
    assert "head: left out by --limit, unreachable now, and its own facts were not cached in the last hour" in words(
        done
    )
    # Where it is reached, it is asked.
    facts = {"ansible_facts": FACTS | {"default_ipv4": {"address": "10.0.0.9"}}}
    own = cluster(stand_in(tmp_path, "head", setup=facts), w1=stand_in(tmp_path, "w1"))
    assert playbook(tmp_path, own, *one, "--limit", "w1", name="site.yml").returncode == 0
    (cached,) = (tmp_path / "facts").glob("*head")
    assert "10.0.0.9" in cached.read_text()


def test_facts_are_a_hosts_own_where_they_have_its_address(operations: ModuleType) -> None:
    facts = {"ansible_facts": FACTS}
    hostvars = {
        "own": facts | {"ansible_host": "10.0.0.1"},
        "10.0.0.1": facts,
        "other": facts | {"ansible_host": "10.0.0.2"},
        "unsure": facts | {"ansible_host": "node1.example.org"},
        "none": {"ansible_host": "10.0.0.1"},
    }
    assert operations.operations_facts(hostvars, [*hostvars]) == {name: name for name in hostvars} | {"10.0.0.1": "own"}


def test_what_is_gone_is_told_and_what_is_not(tmp_path: Path, away: dict[str, Any]) -> None:
    inventory = cluster(stand_in(tmp_path, "head"), w1=away)
    asked = ["-e", "confirm=llm-ray"]
    part = playbook(tmp_path, inventory, *asked, "-e", "remove_data=true", name="reset.yml")
    assert part.returncode == 4, part.stdout
    assert (
        "llm-ray is gone from head; its data, too. w1: left out, unreachable or failed, and still has parts of it: run this"
        in words(part)
    )
    inventory = cluster(stand_in(tmp_path, "head"), w1=stand_in(tmp_path, "w1"))
    limited = playbook(tmp_path, inventory, *asked, "-e", "remove_data=true", "--limit", "w1", name="reset.yml")
    assert (
        "llm-ray is gone from w1; models, data and runs are still in /srv/llm-ray. head: left out, unreachable"
        in words(limited)
    )
    whole = playbook(tmp_path, inventory, *asked, name="reset.yml")
    assert "llm-ray is gone; models, data and runs are still in /srv/llm-ray. site.yml makes it anew." in words(whole)


def test_who_did_not_forget_a_worker_is_told(tmp_path: Path, away: dict[str, Any]) -> None:
    head = stand_in(tmp_path, "head", command={"rc": 0, "stdout": '{"drained": true}'})
    inventory = cluster(head, w1=stand_in(tmp_path, "w1"), w2=away)
    done = playbook(tmp_path, inventory, "-e", "node=w1", name="remove_node.yml")
    assert "w1 has left the cluster. w2 may still admit it: run this again when all are reachable." in words(done)


ENVIRONMENT = "/opt/llm-ray/env/a"


def node(folder: Path, name: str, finding: dict[str, str] | None = None) -> dict[str, Any]:
    """A stand-in for a node that runs what is installed, and finds this when it is asked."""
    installed = {"exists": True, "lnk_target": ENVIRONMENT, "lnk_source": ENVIRONMENT}
    said = f"{ENVIRONMENT}/bin/python\n{json.dumps([finding] if finding else [])}"
    state = {"ActiveState": "active", "UnitFileState": "enabled", "MainPID": "1"}
    return stand_in(
        folder,
        name,
        stat={"stat": installed},
        command={"rc": 0, "stdout": said},
        systemd_service={"status": state},
        uri={"status": 401, "url": "agent"},
    )


def test_a_host_that_is_no_node_yet_stops_no_cluster(tmp_path: Path) -> None:
    inventory = cluster(node(tmp_path, "head"), w1=node(tmp_path, "w1"), new=stand_in(tmp_path, "new"))
    done = playbook(tmp_path, inventory, "-e", "rollback=true", "--skip-tags", "preflight", name="upgrade.yml")
    assert done.returncode == 0, done.stdout
    assert "new is not a node yet and is skipped: add it with add_node.yml -e node=new" in words(done)
    assert "a runs on 2 hosts" in words(done)
    assert modules(tmp_path, "new") == ["setup", "stat"]


def test_where_the_head_is_no_node_yet_there_is_nothing_to_upgrade(tmp_path: Path) -> None:
    inventory = cluster(stand_in(tmp_path, "head"), w1=node(tmp_path, "w1"))
    done = playbook(tmp_path, inventory, "--skip-tags", "preflight", name="upgrade.yml")
    assert done.returncode == 2, done.stdout
    assert "head is not a node yet, nothing was changed: create the cluster with site.yml" in words(done)
    assert modules(tmp_path, "w1") == ["setup", "stat"]


@pytest.mark.parametrize(("host", "code"), [("w2", 0), ("w1", 2), ("stranger", 2)])
def test_of_hosts_that_are_left_out_no_node_is_wanted(
    tmp_path: Path, away: dict[str, Any], host: str, code: int
) -> None:
    missing = {"check": "node", "host": host, "result": "failed", "found": "not in the cluster", "fix": "heal it"}
    inventory = cluster(node(tmp_path, "head", missing), w1=node(tmp_path, "w1"), w2=away)
    arguments = ["-e", "rollback=true", "--skip-tags", "preflight", "--limit", "all:!w2"]
    done = playbook(tmp_path, inventory, *arguments, name="upgrade.yml")
    assert done.returncode == code, done.stdout


def test_the_way_back_is_kept_before_ray_stops(tmp_path: Path) -> None:
    done = playbook(
        tmp_path, cluster(node(tmp_path, "head")), "--skip-tags", "preflight", name="upgrade.yml", HOME=str(tmp_path)
    )
    ran = modules(tmp_path, "head")
    assert "file" in ran[: ran.index("systemd_service")], done.stdout


def _environments(folder: Path, *tasks: str, made: str = "") -> None:
    """Do these tasks of the role, with environments of the folder, of which one has been made."""
    variables = {"python_runtime_prefix": str(folder), "__python_runtime_id": made}
    roles = [{"include_role": {"name": "python_runtime", "tasks_from": name}} for name in tasks]
    (folder / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "vars": variables, "tasks": roles}])
    )
    done = playbook(folder, {}, name=str(folder / "play.yml"))
    assert done.returncode == 0, done.stdout


def _links(folder: Path) -> list[str]:
    return [(folder / link).readlink().name for link in ("previous", "current")]


@pytest.fixture
def environments(tmp_path: Path) -> Path:
    """Three environments, of which the last but one runs, and the first ran before."""
    for name in ("a", "b", "c"):
        (tmp_path / "env" / name).mkdir(parents=True)
        (tmp_path / "env" / name / ".whole").touch()
    (tmp_path / "current").symlink_to(tmp_path / "env/b")
    (tmp_path / "previous").symlink_to(tmp_path / "env/a")
    return tmp_path


def test_an_upgrade_that_is_cut_off_when_ray_has_stopped_is_taken_back(environments: Path) -> None:
    _environments(environments, "way_back", made="c")
    assert _links(environments) == ["b", "b"]
    _environments(environments, "previous", "way_back", "switch")
    assert _links(environments) == ["b", "b"]


def test_one_goes_forward_and_back_and_no_further(environments: Path) -> None:
    _environments(environments, "way_back", made="c")
    _environments(environments, "way_back", "switch", made="c")
    assert _links(environments) == ["b", "c"]
    for _ in range(2):
        _environments(environments, "previous", "way_back", "switch")
        assert _links(environments) == ["b", "b"]


def test_environments_beside_the_running_one_and_the_way_back_go(environments: Path) -> None:
    _environments(environments, "prune", made="b")
    assert sorted(path.name for path in (environments / "env").iterdir()) == ["a", "b"]


def test_after_going_back_one_may_still_go_forward(environments: Path) -> None:
    for name, when in (("a", 1), ("b", 2), ("c", 3)):
        os.utime(environments / "env" / name, (when, when))
    _environments(environments, "way_back", "switch", made="c")
    _environments(environments, "previous", "switch", "prune")
    assert _links(environments) == ["b", "b"]
    assert sorted(path.name for path in (environments / "env").iterdir()) == ["b", "c"]


def test_an_error_of_the_command_is_shown_whole(tmp_path: Path) -> None:
    """Also where it quotes another one, as the reason of a replica that did not start."""
    error = "bot does not stop: its replica ended with ValueError: no such row"
    head = stand_in(
        tmp_path, "head", command={"rc": 1, "stdout": json.dumps({"error": error}), "stderr": f"Error: {error}"}
    )
    done = playbook(tmp_path, {"ray_head": {"hosts": {"head": head}}}, "-e", "model=bot", name="serve_stop.yml")
    assert done.returncode == 2, done.stdout
    assert error in words(done)


TABLE = yaml.safe_load((ROOT / "playbooks/vars/cluster.yml").read_text())["__cluster_role_table"]


def test_site_applies_the_roles_of_the_table_in_its_order_to_its_hosts() -> None:
    kinds = {"ray_head:ray_workers:nfs_server": "all", "nfs_server": "nfs_server", "ray_head:ray_workers": "nodes"}
    plays = [play for play in yaml.safe_load((ROOT / "playbooks/site.yml").read_text()) if "roles" in play]
    applied = [(role, kinds[play["hosts"].partition(":&")[0]]) for play in plays for role in play["roles"]]
    early = [role["role"] for role, _ in applied if "not monitoring_enabled" in str(role.get("when"))]
    assert early == ["monitoring"]  # removed before its ports are opened
    applied = [
        (role["role"], hosts) for role, hosts in applied if "not monitoring_enabled" not in str(role.get("when"))
    ]
    assert applied == [(row["role"], row["hosts"]) for row in TABLE if row["role"] != "page"]


def test_ui_applies_the_page_to_the_head_and_site_and_upgrade_keep_it_up_to_date() -> None:
    plays = [play for play in yaml.safe_load((ROOT / "playbooks/ui.yml").read_text()) if "roles" in play]
    assert [(play["hosts"], [role["role"] for role in play["roles"]]) for play in plays] == [("ray_head", ["page"])]
    assert TABLE[-1] == {
        "role": "page",
        "hosts": "head",
        "reset": "ray",
    }  # removed first: its finetunes use Ray and the storage
    for name in ("site.yml", "upgrade.yml"):
        after = (ROOT / "playbooks" / name).read_text().partition("Start Ray, the head first")[2]
        assert "name: page\n        tasks_from: software" in after


def test_reset_removes_every_role_of_the_table() -> None:
    plays = yaml.safe_load((ROOT / "playbooks/reset.yml").read_text())
    steps = [
        task["vars"]["__remove_step"]
        for play in plays
        for task in play["tasks"]
        if "__remove_step" in task.get("vars", {})
    ]
    assert steps == ["ray", "software", "host"]
    assert {row["reset"] for row in TABLE} == set(steps)


def test_roles_of_hosts(tmp_path: Path) -> None:
    tasks = [
        {
            "debug": {
                "msg": "{{ inventory_hostname }}: {{ __cluster_roles | join(' ') }}; {{ __cluster_roles_ever | join(' "
                "') }}."
            }
        }
    ]
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars_files": [str(ROOT / "playbooks/vars/cluster.yml")],
        "tasks": tasks,
    }
    (tmp_path / "roles.yml").write_text(yaml.safe_dump([play]))
    workers = {
        "w1": {},
        "w2": {"ray_node_runtime": "docker", "monitoring_enabled": True, "llm_ray_offline_bundle": "bundle"},
    }
    inventory = {
        "ray_head": {"hosts": {"head": {}}},
        "ray_workers": {"hosts": workers},
        "nfs_server": {"hosts": {"nas": {}}},
    }
    done = playbook(tmp_path, inventory, name=str(tmp_path / "roles.yml"))
    assert done.returncode == 0, done.stdout
    ever = "host_base firewall nfs_client bundle python_runtime docker_engine ray_node monitoring"
    assert f"w1: host_base firewall nfs_client python_runtime ray_node; {ever}." in words(done)
    assert f"w2: host_base firewall nfs_client bundle docker_engine ray_node monitoring; {ever}." in words(done)
    assert "nas: host_base firewall nfs_server; host_base firewall nfs_server monitoring." in words(done)
    assert f"head: host_base firewall nfs_client python_runtime ray_node page; {ever} page." in words(done)
