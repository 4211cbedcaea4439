"""Conversion to OpenVINO: where conversions lie, when one is made, what is refused, and that nothing half-made stays.

What optimum-intel itself does is tested in tests/integration/test_convert.py. Here a few lines of shell are in its
place, that write a small graph, fail as it does, or take their time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from llm_ray.cli.main import cli
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.engines import WEIGHTS, WeightForm
from llm_ray.conf.finetune import DEFAULT_STAGES, STAGES, FinetuneConf
from llm_ray.errors import ModelError
from llm_ray.models.convert import check_environment, convert_model, converted, openvino_folder, size_on_disk

LLM_RAY = str(Path(sys.executable).with_name("llm-ray"))
WRITE = """
for last; do :; done
mkdir -p "$last"
cat >"$last/openvino_model.xml" <<'XML'
<net><data element_type="u8" shape="2, 4" offset="0" size="8" /></net>
XML
printf '12345678' >"$last/openvino_model.bin"
echo "$TMPDIR" >"${0%/bin/python}/asked"
"""
Tool = Callable[[str], Path]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Makes an environment whose interpreter is this script, and names it to llm-ray."""
    folder = tmp_path / "environment"
    monkeypatch.setenv("LLM_RAY_CONVERT_ENV", str(folder))

    def make(script: str) -> Path:
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for name in ("python", "optimum-cli"):
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}")
            (folder / "bin" / name).chmod(0o755)
        return folder

    return make


def convert(source: Path, target: Path, weights: WeightForm = "int8", force: bool = False) -> Path:
    return convert_model(source, target, weights, Terminal(), force=force)


# Places ---------------------------------------------------------------------------------------------------------------


def test_where_conversions_lie(tmp_path: Path) -> None:
    registry, run = tmp_path / "models", tmp_path / "runs" / "support-bot"
    assert converted(registry / "small", "int8", registry) == registry / "small-openvino-int8"
    assert converted(Path("/srv/Qwen3-0.6B"), "bf16", registry) == registry / "Qwen3-0.6B-openvino-bf16"
    assert converted(run / "output", "int4", registry) == registry / "output-openvino-int4", "as long as it is no run's"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    assert converted(run / "output", "int4", registry) == run / "openvino-int4"


def test_what_is_there_is_taken(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE)
    registry = tmp_path / "models"
    assert openvino_folder(tiny, "int4", registry, Terminal()) == registry / "tiny-openvino-int4"
    tool("exit 1")
    assert openvino_folder(tiny, None, registry, Terminal()) == registry / "tiny-openvino-int4", "whichever is there"
    with pytest.raises(ModelError):
        openvino_folder(tiny, "int8", registry, Terminal())
    tool(WRITE)
    openvino_folder(tiny, "int8", registry, Terminal())
    assert openvino_folder(tiny, None, registry, Terminal()) == registry / "tiny-openvino-int8", "int8 before others"


def test_int8_is_made_when_nothing_is_asked_for(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE)
    assert openvino_folder(tiny, None, tmp_path / "models", Terminal()).name == "tiny-openvino-int8"


def test_a_converted_folder_is_its_own_conversion(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE)
    folder = convert(tiny, tmp_path / "elsewhere")
    assert openvino_folder(folder, None, tmp_path / "models", Terminal()) == folder
    assert openvino_folder(folder, "int8", tmp_path / "models", Terminal()) == folder
    with pytest.raises(
        ModelError, match="has int8 weights, but int4 is requested: use the model that it was made from"
    ):
        openvino_folder(folder, "int4", tmp_path / "models", Terminal())
    with pytest.raises(ModelError, match="OpenVINO form"):
        convert(folder, tmp_path / "again")


# What is in it --------------------------------------------------------------------------------------------------------


def test_all_but_the_weights_is_the_original(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE)
    (tiny / "README.md").write_text("---\nlicense: mit\n---\n")
    (tiny / "generation_config.json").write_text('{"eos_token_id": 2}')
    (tiny / "llm-ray.json").write_text('{"source": "elsewhere", "licence": "apache-2.0"}')
    (tiny / "pytorch_model.bin").touch()
    (tiny / "adapter").mkdir()
    folder = convert(tiny, tmp_path / "models" / "tiny-openvino-int8")
    names = {
        "README.md",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {path.name for path in folder.iterdir()} == {
        *names,
        "openvino_model.xml",
        "openvino_model.bin",
        "llm-ray.json",
    }
    for name in names:
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()
    made = json.loads((folder / "llm-ray.json").read_text())
    assert (made["source"], made["weights"], made["licence"]) == (str(tiny), "int8", "apache-2.0")
    assert len(made["fingerprint"]) == 64


def test_temporary_files_are_on_the_disk_of_the_result(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    environment = tool(WRITE)
    convert(tiny, tmp_path / "models" / "x")
    assert (environment / "asked").read_text().startswith(str(tmp_path / "models"))


# When it is made again ------------------------------------------------------------------------------------------------


def test_it_is_made_once(tmp_path: Path, tiny: Path, tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    tool(WRITE)
    target = convert(tiny, tmp_path / "target")
    first = (target / "openvino_model.bin").stat().st_ino
    tool("exit 1")
    assert convert(tiny, target) == target
    assert "already converted from the same model" in capsys.readouterr().err
    moved = tiny.rename(tmp_path / "moved")
    assert convert(moved, target) == target, "the same model, wherever it lies"
    with pytest.raises(ModelError):
        convert(moved, target, force=True)
    assert (target / "openvino_model.bin").stat().st_ino == first, "a failure leaves what was there"
    tool(WRITE)
    convert(moved, target, force=True)
    assert (target / "openvino_model.bin").stat().st_ino != first


def test_a_changed_or_damaged_one_is_replaced(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE)
    target = convert(tiny, tmp_path / "target")
    (tiny / "chat_template.jinja").write_text("{{ messages }}")
    convert(tiny, target)
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    (target / "openvino_model.bin").write_bytes(b"1")
    convert(tiny, target)
    assert (target / "openvino_model.bin").read_bytes() == b"12345678"


def test_another_conversion_is_replaced_when_asked_for(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE)
    target = convert(tiny, tmp_path / "target", "int8")
    with pytest.raises(ModelError, match=r"contains another conversion, of .*tiny with int8 weights: .*--force"):
        convert(tiny, target, "int4")
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match="contains another conversion"):
        convert(other, target, "int8")
    assert json.loads((convert(other, target, "int4", force=True) / "llm-ray.json").read_text())["source"] == str(other)


@pytest.mark.parametrize("force", [False, True])
def test_a_users_own_folder_is_never_replaced(tmp_path: Path, tiny: Path, tool: Tool, force: bool) -> None:
    tool(WRITE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    for target in (tmp_path / "mine", tiny, tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(
            ModelError, match=r"already exists and is not a conversion: choose another --name or --output"
        ):
            convert(tiny, target, force=force)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "…"
    (tmp_path / "empty").mkdir()
    convert(tiny, tmp_path / "empty")


def test_it_runs_with_glibcs_malloc(tmp_path: Path, tiny: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = tool('echo "preloaded: [$LD_PRELOAD]"; exit 1')
    assert environment
    monkeypatch.setenv("LD_PRELOAD", "libm.so.6")
    with pytest.raises(ModelError, match=r"preloaded: \[\]"):
        convert(tiny, tmp_path / "x")


# Refusals -------------------------------------------------------------------------------------------------------------


def test_without_its_environment(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_CONVERT_ENV", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"none is not: create it with `make setup-convert`, .*LLM_RAY_CONVERT_ENV"):
        convert(tiny, tmp_path / "models" / "x")
    assert not (tmp_path / "models").exists()
    monkeypatch.delenv("LLM_RAY_CONVERT_ENV")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    with pytest.raises(ModelError, match=f"{tmp_path}/venv-convert is not: create it with `make setup-convert`"):
        check_environment()


def test_too_little_memory(tmp_path: Path, tiny: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(WRITE)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2**28))
    with pytest.raises(
        ModelError, match=r"to int8 needs about 0\.6 GiB of memory, but 0\.2 GiB are free: use another host"
    ):
        convert(tiny, tmp_path / "x")


def test_too_little_disk(tmp_path: Path, tiny: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(WRITE)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"GiB of disk at .* free some space, or choose another place with --output"):
        convert(tiny, tmp_path / "x")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'ValueError: Trying to export a llama model, that is a custom or unsupported architecture'",
            "text models of type llama",
        ),
        (
            "echo 'ValueError: Asked to export a llama model, but it only supports the tasks x'",
            "text models of type llama",
        ),
        (
            "echo 'ValueError: … has model type llama but Transformers does not recognize this architecture.'",
            "text models of type llama",
        ),
        (
            "echo 'ValueError: The current version of Transformers does not allow for the export of the model. Maximum "
            "required is 5.0'",
            "text models of type llama",
        ),
        ("echo 'ValueError: … Please pass the argument trust_remote_code=True'", "it has its own Python code"),
        ("echo 'OSError: [Errno 28] No space left on device'", "the disk is full"),
        ("kill -9 $$", "not enough memory"),
        (
            "echo 'Traceback (most recent call last):'; echo 'builtins.KeyError: 576'",
            "optimum-intel says: KeyError: 576$",
        ),
        ("echo 'ImportError: no such part'; echo goodbye", "optimum-intel says: ImportError: no such part$"),
        ("echo 'a last word'; echo", "optimum-intel says: a last word$"),
        ("true", "optimum-intel says: nothing, with exit code 1"),
    ],
)
def test_why_it_failed(tmp_path: Path, tiny: Path, tool: Tool, script: str, reason: str) -> None:
    tool(f"{script}\nexit 1")
    with pytest.raises(ModelError, match=rf"tiny could not be converted: .*{reason}"):
        convert(tiny, tmp_path / "models" / "x")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".x.lock"]


def test_half_a_result_is_none(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE.replace("12345678", "1234"))
    with pytest.raises(ModelError, match="is missing or truncated"):
        convert(tiny, tmp_path / "models" / "x")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".x.lock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted(tmp_path: Path, tiny: Path, tool: Tool, number: signal.Signals) -> None:
    # The interpreter is a true one here: it is to die with its parent.
    environment = tool("")
    (environment / "bin" / "python").unlink()
    (environment / "bin" / "python").symlink_to(sys.executable)
    started, release = tmp_path / "started", tmp_path / "release"
    os.mkfifo(started)
    os.mkfifo(release)
    module = environment / "optimum" / "commands"
    module.mkdir(parents=True)
    (module / "optimum_cli.py").write_text(
        f"import os\nwith open({str(started)!r}, 'w') as file:\n    "
        f"file.write(str(os.getpid()))\nopen({str(release)!r}).read()\n"
    )
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (environment / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    (site / "optimum.pth").write_text(str(environment))
    command = [LLM_RAY, "model", "convert", str(tiny), "--to", "openvino", "--models", str(tmp_path / "models")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        child = psutil.Process(int(started.read_text()))
        process.send_signal(number)
        _, words = process.communicate()
    gone, _ = psutil.wait_procs([child], timeout=30)
    assert gone
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "Interrupted." in words
        assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny-openvino-int8.lock"]
    else:
        assert not (tmp_path / "models" / "tiny-openvino-int8").exists()


# The command, and the stage -------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, tiny: Path, tool: Tool) -> None:
    tool(WRITE)
    options = ["--models", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    run = CliRunner().invoke
    done = run(cli, ["model", "convert", str(tiny), "--to", "openvino", "--json", *options])
    report = json.loads(done.stdout)
    assert report["path"] == str(tmp_path / "models" / "tiny-openvino-int8")
    assert (report["form"], report["weights"], report["source"]) == ("openvino", "int8", str(tiny))
    named = run(
        cli, ["model", "convert", str(tiny), "--to", "openvino", "--weights", "int4", "--name", "small", *options]
    )
    assert named.stdout.strip() == str(tmp_path / "models" / "small")
    placed = run(cli, ["model", "convert", str(tiny), "--to", "openvino", "--output", str(tmp_path / "out"), *options])
    assert placed.stdout.strip() == str(tmp_path / "out")
    for wrong in (
        ["--name", "a", "--output", "b", "--to", "openvino"],
        ["--name", "../a", "--to", "openvino"],
        ["--to", "onnx"],
        ["--to", "openvino", "--weights", "int2"],
        [],
    ):
        assert run(cli, ["model", "convert", str(tiny), *wrong, *options]).exit_code == 2
    nowhere = run(cli, ["model", "convert", "nothing", "--to", "openvino", *options])
    assert nowhere.exit_code == 1
    assert "no such model" in nowhere.stderr
    hub = run(cli, ["model", "convert", "org/model", "--to", "openvino", *options])
    assert "import it first" in hub.stderr


def test_size_on_disk() -> None:
    assert [round(size_on_disk(1_000_000_000, weights) / 1e9, 1) for weights in WEIGHTS] == [4.0, 2.0, 1.0, 0.7]


def test_the_stage_is_run_where_it_is_named() -> None:
    assert STAGES[-1] == "convert"
    conf = FinetuneConf.model_validate({"name": "x", "model": {"base": "m"}, "data": {"train": "a.jsonl"}})
    assert conf.stages == DEFAULT_STAGES == ("prepare", "train", "evaluate", "export")
    assert (conf.convert.to, conf.convert.weights) == ("openvino", "int8")
