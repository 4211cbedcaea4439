from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import ModelError, RunError, TrainError
from llm_ray.runs.folder import RunFolder, file_hashes, holder, inputs_hash, stored_conf
from tests.runs import opened_run
from tests.unit.runs.conftest import MakeConf

HOLD = """
import json, sys
from llm_ray.conf.finetune import FinetuneConf
from tests.runs import opened_run
with opened_run(FinetuneConf.model_validate(json.loads(sys.argv[1])), force=False):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(conf: FinetuneConf) -> subprocess.Popen[str]:
    """Another process that works in the run until a line is written to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, conf.model_dump_json()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def make_conf_again(run: RunFolder) -> FinetuneConf:
    return FinetuneConf.model_validate(stored_conf(run.path))


def test_a_run_has_its_conf_and_lineage(make_conf: MakeConf) -> None:
    conf = make_conf()
    with opened_run(conf, force=False) as run:
        assert run.lineage()["state"] == "running"
    lineage = json.loads((conf.run_dir / "run.json").read_text())
    assert stored_conf(conf.run_dir) == conf.model_dump(mode="json")
    assert lineage["state"] == "done"
    assert lineage["conf_sha256"] == hashlib.sha256((conf.run_dir / "conf.yaml").read_bytes()).hexdigest()
    data = Path(conf.data.train[0])
    assert lineage["data"]["train"] == [
        {"path": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest(), "bytes": data.stat().st_size}
    ]
    assert lineage["model"]["folder"] == str(conf.paths.models / "tiny")
    assert {"llm_ray", "python", "ray", "torch", "transformers", "peft"} <= {
        name for name, number in lineage["versions"].items() if number
    }


def test_the_fingerprint_follows_the_base_model(make_conf: MakeConf) -> None:
    conf = make_conf()
    with opened_run(conf, force=False) as run:
        before = run.lineage()["model"]["fingerprint"]
    weights = conf.paths.models / "tiny" / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    with opened_run(conf, force=False) as run:
        assert run.lineage()["model"]["fingerprint"] != before


def test_marks(make_conf: MakeConf) -> None:
    with opened_run(make_conf(), force=False) as run:
        assert not run.begin("train", "a")
        assert not run.is_done("train", "a")
        assert run.begin("train", "a")  # begun before with the same inputs, and not done: checkpoints are of use
        run.mark_done("train", "a", 1.5)
        assert run.is_done("train", "a")
        assert not run.is_done("train", "b")
        assert not run.is_done("export", "a")
        assert not run.begin("train", "b")
        run.clear("train")
        assert not run.begin("train", "b")
    with opened_run(make_conf_again(run), force=False) as again:
        assert again.begin("train", "b")


def test_results_are_merged_and_strict_json(make_conf: MakeConf) -> None:
    with opened_run(make_conf(), force=False) as run:
        run.update_result("training", {"loss": 1.0, "step": 3})
        run.update_result("training", {"loss": float("nan")})
        run.update_result("evaluation", {"rows": 2})
        run.write_params({"learning_rate": 0.1})
        assert run.result() == {"training": {"loss": None, "step": 3}, "evaluation": {"rows": 2}}
        assert json.loads((run.path / "params.json").read_text()) == {"learning_rate": 0.1}


@pytest.mark.parametrize(
    ("error", "state"),
    [(TrainError("the loss is NaN"), "failed"), (KeyboardInterrupt(), "stopped"), (ValueError("x"), "failed")],
)
def test_an_error_leaves_its_words(make_conf: MakeConf, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), opened_run(make_conf(), force=False) as run:
        raise error
    assert run.lineage()["state"] == state
    assert str(error) in run.lineage()["reason"]
    with opened_run(make_conf_again(run), force=False):
        assert run.lineage()["reason"] == ""


def test_an_equal_conf_goes_on_and_keeps_what_is_done(make_conf: MakeConf) -> None:
    with opened_run(make_conf(), force=False) as run:
        run.mark_done("prepare", "a", 1)
        created = run.lineage()["created"]
    elsewhere = {
        "runtime": {"workers": 2},
        "tracking": {"tensorboard": False},
        "checkpoint": {"keep": 5},
        "stages": ["prepare"],
    }
    with opened_run(make_conf(**elsewhere), force=False) as run:
        assert run.is_done("prepare", "a")
        assert run.lineage()["created"] == created
        assert stored_conf(run.path)["runtime"]["workers"] == 2


def test_another_conf_is_refused_with_the_keys_that_changed(make_conf: MakeConf) -> None:
    with opened_run(make_conf(), force=False):
        pass
    other = make_conf(training={"epochs": 2, "seed": 7}, tuning={"lora": {"r": 4}})
    with pytest.raises(RunError) as caught, opened_run(other, force=False):
        pass
    message = str(caught.value)
    for line in (
        'training.epochs: "auto" -> 2.0',
        "training.seed: 42 -> 7",
        "tuning.lora.r: 16 -> 4",
        "--force",
        "another name",
    ):
        assert line in message
    assert "global_batch_size" not in message
    assert stored_conf(other.run_dir)["training"]["seed"] == 42
    with opened_run(other, force=True):
        assert stored_conf(other.run_dir)["training"]["seed"] == 7


def test_a_conf_of_another_version_is_refused(make_conf: MakeConf) -> None:
    conf = make_conf()
    with opened_run(conf, force=False):
        pass
    (conf.run_dir / "conf.yaml").write_text("name: run\nno_such_key: 1\n")
    with (
        pytest.raises(RunError, match=r"conf\.yaml cannot be read by llm-ray .*--force"),
        opened_run(conf, force=False),
    ):
        pass
    with opened_run(conf, force=True):
        pass


def test_a_damaged_run_json_is_named(make_conf: MakeConf) -> None:
    conf = make_conf()
    with opened_run(conf, force=False):
        pass
    (conf.run_dir / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json is not valid JSON"), opened_run(conf, force=False):
        pass


def test_a_missing_base_model_leaves_no_folder(make_conf: MakeConf) -> None:
    conf = make_conf(model={"base": "tinny"})
    with pytest.raises(ModelError, match="tiny"), opened_run(conf, force=False):
        pass
    assert not conf.run_dir.exists()


def test_two_processes_do_not_share_a_run(make_conf: MakeConf) -> None:
    conf = make_conf()
    other = hold(conf)
    try:
        assert holder(conf.run_dir) and holder(conf.run_dir)["pid"] == other.pid
        with (
            pytest.raises(RunError, match=rf"in use by process {other.pid} on {os.uname().nodename}"),
            opened_run(conf, force=True),
        ):
            pass
        assert RunFolder(conf.run_dir).lineage()["state"] == "running"
    finally:
        other.communicate("\n")
    assert holder(conf.run_dir) is None
    with opened_run(conf, force=False):
        pass


def test_a_killed_process_gives_its_run_free(make_conf: MakeConf) -> None:
    conf = make_conf()
    other = hold(conf)
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert holder(conf.run_dir) is None
    assert RunFolder(conf.run_dir).lineage()["state"] == "running"
    with opened_run(conf, force=False):
        pass


def test_a_full_disk_is_told(make_conf: MakeConf) -> None:
    conf = make_conf()
    told = pytest.raises(RunError, match=r"no space left for the run's folder .*/runs/run \([\d.]+ GiB free\)")
    with told, opened_run(conf, force=False), Path("/dev/full").open("w") as full:
        full.write("x")  # the kernel's own ENOSPC
    assert RunFolder(conf.run_dir).lineage()["state"] == "failed"


def test_a_file_in_the_place_of_the_folder_is_told(make_conf: MakeConf) -> None:
    conf = make_conf()
    conf.paths.runs.mkdir()
    conf.run_dir.write_text("")
    with pytest.raises(RunError, match=r"runs/run cannot be written: File exists"), opened_run(conf, force=False):
        pass


def test_an_unwritable_folder_is_told(make_conf: MakeConf) -> None:
    # The superuser may not write there either.
    conf = make_conf(paths={"runs": "/sys/llm-ray", "models": str(make_conf("other").paths.models)})
    told = pytest.raises(RunError, match=r"the run's folder /sys/llm-ray/run cannot be written: .* set paths\.runs")
    with told, opened_run(conf, force=False):
        pass


def test_hashes_of_files_folders_and_hub_ids(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl", "readme.md"):
        (folder / name).write_text(name)
    entries = file_hashes([str(folder), "organisation/set"])
    assert [entry.get("path", entry.get("hub")) for entry in entries] == [
        str(folder / "a.jsonl"),
        str(folder / "b.jsonl"),
        "organisation/set",
    ]
    assert entries[0] == {"path": str(folder / "a.jsonl"), "sha256": hashlib.sha256(b"a.jsonl").hexdigest(), "bytes": 7}
    (folder / "a.jsonl").write_text("A.jsonl")
    assert file_hashes([str(folder)])[0]["sha256"] == hashlib.sha256(b"A.jsonl").hexdigest()


def test_hashing_streams(tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    with big.open("wb") as file:
        file.truncate(256 << 20)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file_hashes([str(big)])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_inputs_hash_is_canonical(make_conf: MakeConf) -> None:
    conf = make_conf()
    assert inputs_hash({"a": 1, "b": [1, 2]}) == inputs_hash({"b": (1, 2), "a": 1})
    assert inputs_hash(conf.data, Path("x")) == inputs_hash(conf.data.model_dump(mode="json"), "x")
    assert inputs_hash("a", "b") != inputs_hash("ab")
    with pytest.raises(TypeError):
        inputs_hash(object())
