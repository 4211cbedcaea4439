"""Bringing models into the registry and out of it, whole or not at all; llm-ray model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_ray.cli.model import model as command
from llm_ray.errors import ConfError, ModelError
from llm_ray.models.registry import describe, export_model, import_model, licence, list_models


def test_folder(tiny: Path, tmp_path: Path) -> None:
    (tiny / ".git").mkdir()
    (tiny / "pytorch_model.bin").write_bytes(b"pickle")
    (tiny / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    target = import_model(str(tiny), "small", tmp_path / "models")
    assert target == tmp_path / "models" / "small"
    assert not (target / ".git").exists()
    assert not (target / "pytorch_model.bin").exists()
    lineage = json.loads((target / "llm-ray.json").read_text())
    assert lineage["source"] == str(tiny)
    assert lineage["licence"] == "apache-2.0"
    assert lineage["sha256"] == {
        "model.safetensors": hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    }
    assert (target / "model.safetensors").stat().st_ino != (
        tiny / "model.safetensors"
    ).stat().st_ino  # the user's may change
    info = describe(target)
    assert (info.name, info.architecture, info.dtype, info.chat_template, info.problem) == (
        "small",
        "LlamaForCausalLM",
        "fp32",
        True,
        None,
    )
    assert info.licence == "apache-2.0"


def test_gguf(tmp_path: Path, write_gguf: Callable[[Path], Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_gguf(tmp_path / "Tiny.F32.gguf")
    target = import_model(str(file), "small", tmp_path / "models")
    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    assert model.generation_config.eos_token_id == [0, 1]  # the end of a text, and the end of a turn
    assert model.generation_config.bos_token_id == 2
    assert tokenizer.eos_token_id == 0
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hehe"}], tokenize=False) == "hehe<|eot_id|>"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    lineage = json.loads((target / "llm-ray.json").read_text())
    assert (lineage["gguf_file"], lineage["licence"]) == ("Tiny.F32.gguf", "mit")
    assert list(lineage["sha256"]) == ["Tiny.F32.gguf"]
    # The folder that holds it, too, may be named.
    assert describe(import_model(str(tmp_path), "again", tmp_path / "models")).problem is None


def test_gguf_to_choose(tmp_path: Path, write_gguf: Callable[[Path], Path]) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / "two" / name)
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\): choose one with --gguf-file"):
        import_model(str(tmp_path / "two"), "small", tmp_path / "models")
    with pytest.raises(ModelError, match=r"has no c.gguf; its GGUF files: a.gguf, b.gguf"):
        import_model(str(tmp_path / "two"), "small", tmp_path / "models", gguf_file="c.gguf")
    assert import_model(str(tmp_path / "two"), "small", tmp_path / "models", gguf_file="b.gguf").is_dir()


@pytest.mark.parametrize("length", [0, 3, 100, 3000, -64])
def test_damaged_gguf(tmp_path: Path, write_gguf: Callable[[Path], Path], length: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    with file.open("rb+") as stream:
        stream.truncate(length if length >= 0 else file.stat().st_size + length)
    with pytest.raises(ModelError, match=r"tiny\.gguf (is not a complete GGUF|cannot be read as a model)"):
        import_model(str(file), "small", tmp_path / "models")
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".lock"]


def test_no_llm_in_the_gguf(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "whisper")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"x\.gguf cannot be read as a model of type whisper"):
        import_model(str(tmp_path / "x.gguf"), "small", tmp_path / "models")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("pypi:no-such-package-here", "pip install no-such-package-here"),
        ("pypi:click", "the package click holds no GGUF files"),
        ("./gone", "no such file or folder"),
        ("/gone/folder", "no such file or folder"),
        ("gone", "no such file or folder"),
        ("organisation/gone", "no such folder.*HF_HUB_OFFLINE disables"),
    ],
)
def test_no_source(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        import_model(source, "small", tmp_path / "models")


def test_file_of_another_kind(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a folder in Hugging Face form, or a \.gguf file"):
        import_model(str(tiny / "model.safetensors"), "small", tmp_path / "models")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../x", "ä", "-x"])
def test_bad_name(tiny: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfError, match="model name"):
        import_model(str(tiny), name, tmp_path / "models")


def test_never_overwritten_unasked(tiny: Path, tmp_path: Path) -> None:
    target = import_model(str(tiny), "small", tmp_path / "models")
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"already exists: .*--force"):
        import_model(str(tiny), "small", tmp_path / "models")
    (tiny / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="damaged or truncated"):
        import_model(str(tiny), "small", tmp_path / "models", force=True)
    assert (target / "mine.txt").read_text() == "mine"  # the old one stays when the new one is not whole
    assert describe(target).problem is None


def test_force(tiny: Path, tmp_path: Path) -> None:
    target = import_model(str(tiny), "small", tmp_path / "models")
    (target / "mine.txt").write_text("mine")
    import_model(str(tiny), "small", tmp_path / "models", force=True)
    assert not (target / "mine.txt").exists()
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [".lock", "small"]


def test_from_the_hubs_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot as the hub's client lays it out: links into blobs. Weights are shared with the cache, files to edit
    are not."""
    repository, commit = tmp_path / "cache" / "models--org--tiny", "0" * 40
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in tiny.iterdir():
        shutil.copy2(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    target = import_model("org/tiny", "small", tmp_path / "models")
    assert not any(p.is_symlink() for p in target.iterdir())
    assert (target / "model.safetensors").stat().st_ino == (repository / "blobs" / "model.safetensors").stat().st_ino
    assert (target / "config.json").stat().st_ino != (repository / "blobs" / "config.json").stat().st_ino
    assert json.loads((target / "llm-ray.json").read_text())["source"] == "org/tiny (hub)"


def test_unwritable(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the registry should be")
    with pytest.raises(ModelError, match=r"cannot be written: .*GiB are free there"):
        import_model(str(tiny), "small", tmp_path / "models")


def test_two_at_once(tiny: Path, tmp_path: Path) -> None:
    """Two processes import under one name: one of them does, the other is told so."""
    code = "from llm_ray.cli.main import main; main()"
    call = [
        sys.executable,
        "-c",
        code,
        "model",
        "import",
        str(tiny),
        "--name",
        "small",
        "--models",
        str(tmp_path / "models"),
    ]
    both = [subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert sum("already exists" in text for text in errors) == 1
    assert describe(tmp_path / "models" / "small").problem is None


def test_others_may_read(tiny: Path, tmp_path: Path) -> None:
    """safetensors makes its files 0600: on shared storage others serve what one has imported."""
    (tiny / "model.safetensors").chmod(0o600)
    old = os.umask(0o022)
    try:
        target = import_model(str(tiny), "small", tmp_path / "models")
    finally:
        os.umask(old)
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_list(tiny: Path, tmp_path: Path) -> None:
    registry, runs = tmp_path / "models", tmp_path / "runs"
    assert list_models(registry, runs) == []
    import_model(str(tiny), "small", registry)
    shutil.copytree(tiny, runs / "support-bot" / "output")
    (runs / "support-bot" / "run.json").write_text(json.dumps({"model": {"base": "small"}}))
    (runs / "unfinished").mkdir()
    shutil.copytree(tiny, registry / "broken")
    (registry / "broken" / "model.safetensors").unlink()
    broken, small, bot = list_models(registry, runs)
    assert broken.problem
    assert "no weights" in broken.problem
    assert (small.name, small.kind, small.problem) == ("small", "base", None)
    assert (bot.name, bot.kind, bot.source) == ("support-bot", "run", "run of small")


def test_export(tiny: Path, tmp_path: Path) -> None:
    export_model(tiny, tmp_path / "out")
    assert describe(tmp_path / "out").problem is None
    with pytest.raises(ModelError, match="already exists"):
        export_model(tiny, tmp_path / "out")
    with pytest.raises(ModelError, match="is inside"):
        export_model(tiny, tiny / "below")
    (tiny / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        export_model(tiny, tmp_path / "other")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("no header", None),
        ("---\nlicense: [\n---\n", None),
        ("---\ntags: [x]\n---\n", None),
    ],
)
def test_licence(tmp_path: Path, card: str, expected: str | None) -> None:
    assert licence(tmp_path) is None
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path) == expected


def test_command(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path / "home"))
    runner = CliRunner()
    assert "There are no models" in runner.invoke(command, ["list"]).stderr
    done = runner.invoke(command, ["import", str(tiny), "--name", "small"], catch_exceptions=False)
    assert str(tmp_path / "home" / "models" / "small") in done.stdout
    assert "small" in runner.invoke(command, ["list"]).stdout
    listed = json.loads(runner.invoke(command, ["list", "--json"]).stdout)
    assert [entry["name"] for entry in listed] == ["small"]
    exported = runner.invoke(command, ["export", "small", str(tmp_path / "out")], catch_exceptions=False)
    assert exported.exit_code == 0
    assert describe(tmp_path / "out").problem is None
    assert runner.invoke(command, ["remove", "small"], input="n\n").exit_code == 1
    assert runner.invoke(command, ["remove", "small"], input="y\n", catch_exceptions=False).exit_code == 0
    assert json.loads(runner.invoke(command, ["list", "--json"]).stdout) == []
    with pytest.raises(ModelError, match="no model small in the registry"):
        runner.invoke(command, ["remove", "small", "--yes"], catch_exceptions=False)


def test_command_messages(tiny: Path, tmp_path: Path) -> None:
    """Through the real command: a message and an exit code, no traceback."""
    environment = os.environ | {"LLM_RAY_HOME": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", "from llm_ray.cli.main import main; main()", "model", *arguments]
        return subprocess.run(call, capture_output=True, text=True, env=environment, check=False)

    for arguments, words, code in (
        (["import", "./gone"], "no such file or folder", 1),
        (["import", str(tiny), "--name", "a/b"], "model name 'a/b'", 2),
        (["export", "gone", "out"], "llm-ray model import", 1),
        (["export", "organisation/model", "out"], "import it first", 1),
    ):
        ended = run(*arguments)
        assert ended.returncode == code
        assert words in ended.stderr
        assert "Traceback" not in ended.stderr
