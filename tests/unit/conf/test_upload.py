"""A conf for a cluster elsewhere: whose paths are whose, what is taken along, and what is told before anything
starts."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.load import load_finetune, load_serve
from llm_ray.conf.section import home
from llm_ray.conf.serve import ServeConf
from llm_ray.conf.upload import ClusterConf, Destination, digest, finetune_for_cluster, serve_for_cluster
from llm_ray.errors import ConfError
from tests.unit.ansible.conftest import load

TO = Destination(
    Path("/srv/llm-ray"),
    "bare_metal",
    {"head": ["10.0.0.1"], "w1": ["10.0.0.2"], "w2": ["10.0.0.3"], "ray_workers": ["10.0.0.2", "10.0.0.3"]},
)
CONF = """\
name: trial
runtime: {mode: local, address: 10.9.9.9:6379, workers: 2}
model: {base: some-model}
data: {train: rows.jsonl, validation: null}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a conf, a file of rows and a model; the current folder is another."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "conf.yaml").write_text(CONF)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "own.py").write_text("class Own: pass\n")
    return tmp_path


def _finetune(folder: Path, *settings: str) -> tuple[FinetuneConf, ClusterConf]:
    shipped = finetune_for_cluster(folder / "conf.yaml", settings, {}, TO)
    assert isinstance(shipped.conf, FinetuneConf)
    return shipped.conf, shipped


def test_paths_are_the_clusters_and_are_not_looked_for_here(folder: Path) -> None:
    conf, shipped = _finetune(folder)
    assert conf.data.train == ("/srv/llm-ray/data/rows.jsonl",)
    assert conf.model.base == "some-model"
    assert str(conf.run_dir) == "/srv/llm-ray/runs/trial"
    assert (conf.runtime.mode, conf.runtime.address) == ("cluster", "auto")
    assert shipped.files == ()
    assert home() != TO.home


def test_files_to_upload_become_places_named_by_their_contents(folder: Path) -> None:
    settings = [
        "data.upload=true",
        "model.upload=true",
        f"model.base={folder / 'base'}",
        "data.processor=../own.py:Own",
        "evaluation.data=../rows.jsonl",
    ]
    conf, shipped = _finetune(folder, *settings, f"model.chat_template={folder / 'template.jinja'}")
    by_key = {each.key: each for each in shipped.files}
    assert set(by_key) == {"data.train[0]", "evaluation.data[0]", "data.processor", "model.base", "model.chat_template"}
    rows = hashlib.sha256(b'{"text": "a"}\n').hexdigest()
    assert conf.data.train == (f"/srv/llm-ray/data/uploads/{rows[:16]}/rows.jsonl",) == conf.evaluation.data
    assert by_key["data.train[0]"].source == folder / "rows.jsonl"
    assert conf.model.base == by_key["model.base"].target
    assert str(conf.model.chat_template) == by_key["model.chat_template"].target
    assert conf.data.processor == f"{by_key['data.processor'].target}:Own"
    assert not conf.data.upload
    assert not conf.model.upload


def test_what_is_shipped_is_a_conf_that_the_cluster_reads(folder: Path, tmp_path: Path) -> None:
    _, shipped = _finetune(folder, "data.train=/dev/null", "data.format=messages")
    file = tmp_path / "sent.yaml"
    file.write_text(shipped.text)
    assert load_finetune(file) == shipped.conf
    assert shipped.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_hosts_and_groups_of_the_inventory_become_addresses(folder: Path) -> None:
    assert _finetune(folder, "runtime.hosts=[ray_workers, w1, 10.0.0.1]")[0].runtime.hosts == (
        "10.0.0.2",
        "10.0.0.3",
        "10.0.0.1",
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["runtime.hosts=wrokers"],
            "runtime.hosts: the inventory has no Ray node or group wrokers; did you mean ray_workers?",
        ),
        (["runtime.nodes=docker"], "runtime.nodes is docker, but the cluster's nodes run as bare_metal"),
        (
            ["data.train=./rows.jsonl"],
            "data.train[0] is ./rows.jsonl: the cluster cannot see this machine's folders",
        ),
        (["model.base=~/model"], "or set model.upload: true if it is on this machine"),
        (["model.chat_template=t.jinja"], "model.chat_template is t.jinja: the cluster cannot see"),
        (["data.processor=own.py:Own"], "data.processor is own.py:Own: the cluster cannot see"),
        (["data.upload=true", "data.train=../rosw.jsonl"], "data.train: no such file or folder"),
        (["model.upload=true", "model.base=./nowhere"], "model.base: no such folder"),
        (["model.upload=true", "model.chat_template=t.jinja"], "model.chat_template: no such file on this machine"),
        (["paths.runs=runs"], "paths.runs is runs: the cluster cannot see"),
        (["training.epoch=2"], "did you mean training.epochs?"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, settings: list[str], words: str) -> None:
    with pytest.raises(ConfError) as error:
        _finetune(folder, *settings)
    assert words in str(error.value)
    assert home() != TO.home


def test_a_model_of_this_machines_registry_is_taken_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(folder / "home"))
    (folder / "home/models").mkdir(parents=True)
    (folder / "base").rename(folder / "home/models/mine")
    conf, shipped = _finetune(folder, "model.upload=true", "model.base=mine")
    assert [each.source for each in shipped.files] == [folder / "home/models/mine"]
    assert conf.model.base.endswith("/mine")


def test_an_endpoints_models_and_adapters(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    (folder / "serve.yaml").write_text(
        "models:\n  one: {model: ./base, upload: true, adapters: {two: ./adapter}}\n  other: {model: a-run}\n"
        "endpoint: {host: 0.0.0.0, tls_certificate: /etc/host.pem, tls_key: /etc/host.key}\n"
    )
    shipped = serve_for_cluster(folder / "serve.yaml", [], {}, TO)
    assert isinstance(shipped.conf, ServeConf)
    assert [each.key for each in shipped.files] == ["models.one.model", "models.one.adapters.two"]
    assert shipped.conf.models["one"].adapters["two"] == shipped.files[1].target
    assert shipped.conf.models["other"].model == "a-run"
    assert str(shipped.conf.endpoint.tls_certificate) == "/etc/host.pem"
    with pytest.raises(ConfError, match=r"models\.other\.model is \./base: .*set models\.other\.upload: true"):
        serve_for_cluster(folder / "serve.yaml", ["models.other.model=./base"], {}, TO)
    (tmp_path / "sent.yaml").write_text(
        serve_for_cluster(
            folder / "serve.yaml", ["endpoint.tls_certificate=null", "endpoint.tls_key=null"], {}, TO
        ).text
    )
    with pytest.raises(ConfError, match="no such folder"):  # the cluster looks for them
        load_serve(tmp_path / "sent.yaml")


def test_a_folders_digest_is_that_of_sha256sums_lines(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two").write_text("2")
    (tmp_path / "a").write_text("1")
    lines = subprocess.run(["sha256sum", "a", "b/two"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert digest(tmp_path) == (hashlib.sha256(lines).hexdigest(), 2)
    on_hosts = load("roles/ray_job/library/shared_file.py").digest  # their own way comes to the same
    assert on_hosts(str(tmp_path)) == digest(tmp_path)[0]
    (tmp_path / "linked").symlink_to("b", target_is_directory=True)
    assert on_hosts(str(tmp_path)) == digest(tmp_path)[0] != hashlib.sha256(lines).hexdigest()


def test_a_task_file_is_taken_along_with_its_folder(folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks/parts.yaml").write_text("task: parts\n")
    (folder / "tasks/parts.jsonl").write_text("{}\n")
    tasks = "evaluation.tasks=[arc_easy, ../tasks/parts.yaml, ../tasks]"
    conf, shipped = _finetune(folder, tasks, "data.upload=true", "data.train=../rows.jsonl")
    uploaded = f"/srv/llm-ray/data/uploads/{digest(folder / 'tasks')[0][:16]}/tasks"
    assert conf.evaluation.tasks == ("arc_easy", f"{uploaded}/parts.yaml", uploaded)
    assert {file.source.resolve() for file in shipped.files} == {folder / "tasks", folder / "rows.jsonl"}
    with pytest.raises(ConfError, match=r"evaluation\.tasks\[1\] is \.\./tasks/parts\.yaml: the cluster cannot see"):
        _finetune(folder, tasks)
