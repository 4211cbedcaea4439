"""What finetune.yml and serve.yml decide: addresses by name, cores, why a job failed, what is shown at the end."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.unit.ansible.conftest import load

ROOT = Path(__file__).parents[3]


# At collection Ansible's modules would patch Python before torch is imported.
@pytest.fixture(scope="module")
def job() -> ModuleType:
    return load("roles/ray_job/library/ray_job.py")


@pytest.fixture(scope="module")
def filters() -> ModuleType:
    return load("roles/ray_job/filter_plugins/ray_job.py")


def test_groups_and_hosts_stand_for_addresses_of_rays_nodes(filters: ModuleType) -> None:
    facts = {"ansible_facts": {"default_ipv4": {"address": "10.0.0.1"}}}
    hostvars = {"head": facts, "w1": facts | {"ray_node_address": "10.1.0.2"}, "w2": {"ansible_host": "10.0.0.3"}, "w3": {}}
    addresses = filters.ray_job_addresses(hostvars, ["head", "w1", "w2", "w3"])
    assert addresses == {"head": "10.0.0.1", "w1": "10.1.0.2", "w2": "10.0.0.3", "w3": "w3"}
    names = filters.ray_job_names(addresses, {"ray_workers": ["w1", "w2"], "nfs_server": ["other"], "ungrouped": [], "all": ["head", "w1"]})
    assert names == {"ray_workers": ["10.1.0.2", "10.0.0.3"], "all": ["10.0.0.1", "10.1.0.2"], "head": ["10.0.0.1"], "w1": ["10.1.0.2"],
                     "w2": ["10.0.0.3"], "w3": ["w3"]}  # fmt: skip


@pytest.mark.parametrize(
    ("host", "cores"),
    [({"ray_node_cpus": 4}, 4), ({"ray_node_cpus": "auto", "ansible_facts": {"processor_vcpus": 16}}, 16), ({}, 1)],
)
def test_cores_that_a_host_gives_to_ray(filters: ModuleType, host: dict[str, Any], cores: int) -> None:
    assert filters.ray_job_cpus(host) == cores


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prepare …\nError: data.train: no such file\n  /a\n", "Error: data.train: no such file\n  /a"),
        ("one\ntwo\nthree\nfour", "two\nthree\nfour"),
        ("", "the driver was killed"),
    ],
)
def test_why_a_job_failed(filters: ModuleType, text: str, reason: str) -> None:
    assert filters.ray_job_reason(text, "x\nthe driver was killed\n") == reason


def test_words_of_a_command_are_quoted_where_a_shell_would_take_them_apart(job: ModuleType) -> None:
    assert [job.quote(word) for word in ("--config", "/a/b.yaml", "two words", "it's")] == [
        "--config",
        "/a/b.yaml",
        "'two words'",
        "'it'\"'\"'s'",
    ]


def test_jobs_of_a_name_are_its_own_and_not_those_of_longer_names(job: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"finetune-a-1": "SUCCEEDED", "finetune-a-2": "RUNNING", "finetune-a-b-7": "RUNNING"}
    answer = [{"submission_id": name, "status": status} for name, status in told.items()] + [{"submission_id": None, "status": "RUNNING"}]
    monkeypatch.setattr(job.Api, "__call__", lambda self, path: answer)
    api = job.Api("http://127.0.0.1:1", "token")
    assert sorted(api.jobs("finetune-a")) == [1, 2]
    assert api.running("finetune-a")["submission_id"] == "finetune-a-2"
    assert api.running("finetune-c") is None


def test_a_head_that_does_not_answer_is_told(job: ModuleType) -> None:
    with pytest.raises(job.Refused, match=r"Ray's head does not answer at http://127\.0\.0\.1:1 .*journalctl -u llm-ray-head"):
        job.Api("http://127.0.0.1:1", "token")("/api/jobs/")


def test_what_a_finetune_made(operations: ModuleType) -> None:
    result = {
        "training": {"loss": 1.5, "tokens": 12345, "tokens_per_second": 99.6},
        "evaluation": {"base": {"perplexity": 20.0}, "finetuned": {"perplexity": 5.5}},
    }
    told = operations.workflow_figures(result, "bot", "/srv/runs/bot", ["train", "export"])
    assert told.splitlines() == [
        "bot is done: /srv/runs/bot",
        "loss 1.5000, 12,345 tokens, 100 tokens/s",
        "perplexity: 20.000 before, 5.500 after",
        "the model: /srv/runs/bot/output",
        "to serve it: ansible-playbook serve.yml -e model=bot",
    ]
    assert operations.workflow_figures({}, "bot", "/srv/runs/bot", ["prepare"]) == "bot is done: /srv/runs/bot"


def test_the_playbooks_arguments_are_no_keys_of_a_conf() -> None:
    from llm_ray.conf.keys import FINETUNE, SERVE

    arguments = yaml.safe_load((ROOT / "playbooks/vars/workflow.yml").read_text())
    assert not set(arguments["__finetune_arguments"]) & set(FINETUNE.table)
    assert not set(arguments["__serve_own_arguments"]) & set(SERVE.table)


@pytest.fixture(scope="module")
def rendering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A playbook that renders a conf and writes down what Ansible has of it."""
    folder = tmp_path_factory.mktemp("rendering")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    conf = {"name": "codes", "model": {"base": "small"}, "data": {"train": str(folder / "rows.jsonl"), "upload": True, "validation": None}}
    (folder / "codes.yaml").write_text(yaml.safe_dump(conf))
    action = {
        "kind": "finetune", "conf": str(folder / "codes.yaml"), "bundle": str(ROOT), "home": "/srv/llm-ray", "nodes": "any", "hosts": {},
        "arguments": ["conf"], "variables": {}, "settings": {},
    }  # fmt: skip
    tasks = [{"llm_ray_conf": action, "register": "made"}, {"copy": {"content": "{{ made | to_json }}", "dest": str(folder / "made.json")}}]
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
    (folder / "render.yml").write_text(yaml.safe_dump([play]))
    return folder


def _render(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "ansible-playbook"), str(folder / "render.yml")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "ANSIBLE_ACTION_PLUGINS": str(ROOT / "roles/ray_job/action_plugins")}
    arguments = [argument for setting in settings for argument in ("-e", setting)]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=folder)


def test_a_conf_comes_with_its_checksum_and_the_files_that_go_with_it(rendering: Path) -> None:
    done = _render(rendering, "training.max_steps=7")
    assert done.returncode == 0, done.stdout
    made = json.loads((rendering / "made.json").read_text())
    assert made["resolved"]["training"]["max_steps"] == 7
    assert made["given"] == ["training.max_steps"]
    assert made["sha256"] == hashlib.sha256(made["conf"].encode()).hexdigest()
    (file,) = made["files"]
    assert file["source"] == str(rendering / "rows.jsonl")
    assert file["sha256"] == hashlib.sha256((rendering / "rows.jsonl").read_bytes()).hexdigest()


def test_a_key_that_no_conf_has_is_told_as_it_was_given(rendering: Path) -> None:
    done = _render(rendering, "training.max_stepz=7")
    assert done.returncode == 2
    assert "-e training.max_stepz" in done.stdout + done.stderr
    assert "max_steps" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
