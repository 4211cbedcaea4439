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
def shared() -> ModuleType:
    return load("roles/ray_job/library/shared_file.py")


@pytest.fixture(scope="module")
def filters() -> ModuleType:
    return load("roles/ray_job/filter_plugins/ray_job.py")


def test_groups_and_hosts_stand_for_addresses_of_rays_nodes(filters: ModuleType) -> None:
    addresses = {"head": "10.0.0.1", "w1": "10.1.0.2", "w2": "10.0.0.3", "w3": ""}
    names = filters.ray_job_names(
        addresses, {"ray_workers": ["w1", "w2"], "nfs_server": ["other"], "ungrouped": [], "all": ["head", "w1"]}
    )
    assert names == {"ray_workers": ["10.1.0.2", "10.0.0.3"], "all": ["10.0.0.1", "10.1.0.2"], "head": ["10.0.0.1"], "w1": ["10.1.0.2"],
                     "w2": ["10.0.0.3"], "w3": ["w3"]}  # fmt: skip


@pytest.mark.parametrize(
    ("host", "cores"),
    [({"ray_node_cpus": 4}, 4), ({"ray_node_cpus": "auto", "ansible_facts": {"processor_vcpus": 16}}, 16), ({}, 0)],
)
def test_cores_that_a_host_gives_to_ray(filters: ModuleType, host: dict[str, Any], cores: int) -> None:
    assert filters.ray_job_cpus(host) == cores
    assert filters.ray_job_unknown({"w1": host, "w2": {"ray_node_cpus": 1}}, ["w1", "w2"]) == ([] if cores else ["w1"])


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


def test_jobs_of_a_name_are_its_own_and_not_those_of_longer_names(
    job: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"finetune-a-1": "SUCCEEDED", "finetune-a-2": "RUNNING", "finetune-a-b-7": "RUNNING"}
    answer = [{"submission_id": name, "status": status} for name, status in told.items()] + [
        {"submission_id": None, "status": "RUNNING"}
    ]
    monkeypatch.setattr(job.Api, "__call__", lambda self, path: answer)
    api = job.Api("http://127.0.0.1:1", "token")
    assert sorted(api.jobs("finetune-a")) == [1, 2]
    assert api.running("finetune-a")["submission_id"] == "finetune-a-2"
    assert api.running("finetune-c") is None


def test_a_job_s_log_is_read_from_where_the_last_look_ended(
    job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_CHUNK", 8)
    log, written = tmp_path / "job-driver-finetune-a-1.log", "step 1 … done\nWörter: 日本\n" * 5
    assert job.read_log(str(log), 0) == ("", 0, False)  # the driver has not started
    log.write_text(written[:40])
    asked = {"id": "finetune-a-1", "logs": str(tmp_path), "seconds": 0, "result": None}
    looks, told = [], {"offset": 0, "more": True}
    while told["more"] or len(looks) < 20:
        told = job.follow(lambda path: {"status": "RUNNING"}, asked | {"offset": told["offset"]})
        looks.append(told["text"])
        log.write_text(written)
    assert "".join(looks) == written
    assert max(len(text.encode()) for text in looks) <= 8
    assert told["offset"] == log.stat().st_size


RUNS = {"submission_id": "finetune-a-2", "status": "RUNNING", "metadata": {"conf_sha256": "same"}}


def test_one_attaches_to_the_job_that_does_the_same(job: ModuleType) -> None:
    plain = ["finetune", "--config", "CONF"]
    for began, asked in (
        (plain, plain),
        ([*plain, "--resume", "no", "--force"], plain),
        ([*plain, "--force"], [*plain, "--force"]),
    ):
        runs = RUNS | {"entrypoint": "exec llm-ray " + " ".join(began).replace("CONF", "/a/b.yaml")}
        assert job.attach(runs, {"command": asked, "conf": ""}, "same")["id"] == "finetune-a-2"


@pytest.mark.parametrize("more", [["--force"], ["--resume", "no"], ["--resume", "no", "--force"]], ids=" ".join)
def test_what_a_running_job_would_not_heed_is_refused(job: ModuleType, more: list[str]) -> None:
    runs = RUNS | {"entrypoint": "exec llm-ray finetune --config /a/b.yaml --resume auto"}
    words = f"finetune-a-2 runs, and was not started with {' '.join(more)}: end it first with -e cancel=true"
    with pytest.raises(job.Refused, match=words):
        job.attach(runs, {"command": ["finetune", "--config", "CONF", *more], "conf": ""}, "same")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "finetune",
            r"\(-a: 1; \+a: 2\): wait for it, stop it with -e cancel=true, or use another name with -e name=…",
        ),
        (
            "serve",
            r"\(-a: 1; \+a: 2\): wait until it has ended, as status.yml shows, or end it on the head: /opt/llm-ray/current/bin/ray job stop serve-endpoint-2",
        ),
    ],
)
def test_beside_another_conf_what_can_be_done_is_told(job: ModuleType, tmp_path: Path, kind: str, said: str) -> None:
    (tmp_path / "conf.yaml").write_text("a: 1")
    runs = RUNS | {
        "submission_id": f"{kind}-endpoint-2",
        "metadata": {"conf_sha256": "other", "conf": str(tmp_path / "conf.yaml")},
    }
    with pytest.raises(job.Refused, match=f"{kind}-endpoint-2 runs with another conf {said}$"):
        job.attach(runs, {"command": [kind, "--config", "CONF"], "conf": "a: 2"}, "same")


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_of_two_that_copy_the_same_the_slower_one_leaves_what_is_there(
    shared: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    source, path, mark = tmp_path / "source", tmp_path / "up/rows", tmp_path / "up/.rows.sha256"
    if folder:
        source.mkdir()
    (source / "one" if folder else source).write_text("rows")
    sha256, copyfile, inodes = shared.digest(str(source)), shared.shutil.copyfile, []

    def slow(*of: str, **how: bool) -> None:
        if not inodes:
            inodes.append(0)
            shared.put(str(source), str(path), str(mark), sha256)
            inodes.append(path.stat().st_ino)
        copyfile(*of, **how)

    monkeypatch.setattr(shared.shutil, "copyfile", slow)
    if folder:
        monkeypatch.setattr(shared.shutil, "copytree", lambda a, b: (Path(b).mkdir(), slow(f"{a}/one", f"{b}/one")))
    shared.put(str(source), str(path), str(mark), sha256)
    assert path.stat().st_ino == inodes[1]
    assert shared.is_there(str(path), str(mark), sha256)
    assert shared.digest(str(path)) == sha256
    assert sorted(file.name for file in path.parent.iterdir()) == [".rows.sha256", "rows"]


def test_what_is_there_and_not_whole_is_replaced(shared: ModuleType, tmp_path: Path) -> None:
    source, path, mark = tmp_path / "source", tmp_path / "rows", tmp_path / ".rows.sha256"
    source.write_text("rows")
    path.write_text("ro")
    shared.put(str(source), str(path), str(mark), shared.digest(str(source)))
    assert path.read_text() == "rows"
    assert mark.read_text() == f"{shared.digest(str(path))}  rows\n"


def test_a_head_that_does_not_answer_is_told(job: ModuleType) -> None:
    with pytest.raises(
        job.Refused, match=r"Ray's head does not answer at http://127\.0\.0\.1:1 .*journalctl -u llm-ray-head"
    ):
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
    conf = {
        "name": "codes",
        "model": {"base": "small"},
        "data": {"train": str(folder / "rows.jsonl"), "upload": True, "validation": None},
    }
    (folder / "codes.yaml").write_text(yaml.safe_dump(conf))
    action = {
        "kind": "finetune", "conf": str(folder / "codes.yaml"), "bundle": str(ROOT), "home": "/srv/llm-ray", "nodes": "any", "hosts": {},
        "arguments": ["conf"], "variables": {}, "settings": {},
    }  # fmt: skip
    _play(folder / "render.yml", action)
    (folder / "cores.yaml.j2").write_text(
        (folder / "codes.yaml").read_text() + "runtime: {cpus_per_worker: {{ cpus_per_host }}}\n"
    )
    lost = {"conf": str(folder / "cores.yaml.j2"), "unknown": ["w2"], "variables": {"cpus_per_host": 0}}
    _play(folder / "lost.yml", action | lost)
    endpoint = {"kind": "serve", "conf": "cluster", "settings": {"model": "codes", "serve_host": "0.0.0.0"}}  # noqa: S104
    _play(folder / "endpoint.yml", action | endpoint | {"guarded": ["{{ 8000 }}", "9000-9010"]})
    return folder


def _play(file: Path, action: dict[str, Any]) -> None:
    tasks = [
        {"llm_ray_conf": action, "register": "made"},
        {"copy": {"content": "{{ made | to_json }}", "dest": str(file.parent / "made.json")}},
    ]
    file.write_text(
        yaml.safe_dump([{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}])
    )


def _render(folder: Path, *settings: str, play: str = "render") -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "ansible-playbook"), str(folder / f"{play}.yml")]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "ANSIBLE_ACTION_PLUGINS": str(ROOT / "roles/ray_job/action_plugins"),
    }
    arguments = [argument for setting in settings for argument in ("-e", setting)]
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=folder
    )


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


def test_cores_that_are_not_known_are_told_and_not_guessed(rendering: Path) -> None:
    done = _render(rendering, play="lost")
    assert done.returncode == 2
    assert "cores.yaml.j2 asks for cpus_per_host, and the cores of w2 are not known" in " ".join(done.stdout.split())
    assert _render(rendering, "cpus_per_host=2", play="lost").returncode == 0
    assert json.loads((rendering / "made.json").read_text())["resolved"]["runtime"]["cpus_per_worker"] == 2


@pytest.mark.parametrize(
    ("settings", "refused"),
    [([], False), (["port=9005"], False), (["port=9100"], True), (["port=9100", "serve_host=127.0.0.1"], False)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_endpoint_that_others_reach_is_behind_the_firewall(
    rendering: Path, settings: list[str], refused: bool
) -> None:
    done = _render(rendering, *settings, play="endpoint")
    words = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == (2 if refused else 0), words
    said = "endpoint.port is 9100, none of the ports that the firewall guards (8000, 9000-9010), and endpoint.host is 0.0.0.0: set llm_ray_serve_port: 9100"
    assert (said in words) == refused, words
