"""Ansible's parts that are Python, loaded from where the roles have them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FACTS = {
    "default_ipv4": {"address": "10.0.0.1"},
    "all_ipv4_addresses": ["10.0.0.1"],
    "distribution": "Debian",
    "distribution_major_version": "12",
    "os_family": "Debian",
    "hostname": "host",
    "service_mgr": "systemd",
    "pkg_mgr": "apt",
    "python": {"executable": "/usr/bin/python3"},
}


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    shared = (ROOT / path).parent.parent / "module_utils"
    if shared.is_dir():  # of the role, which Ansible puts beside its own
        importlib.import_module("ansible.module_utils").__path__.append(str(shared))
    spec.loader.exec_module(module)
    return module


def playbook(
    folder: Path,
    inventory: dict[str, Any],
    *arguments: str,
    name: str = "preflight.yml",
    cwd: Path = ROOT,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run one of the bundle's playbooks from here with this inventory, which is written to the folder."""
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "-i",
        str(folder / "hosts.yml"),
        str(ROOT / name),
        *arguments,
    ]
    own = {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(folder / "facts"),
        "ANSIBLE_FORCE_COLOR": "0",
    }
    return subprocess.run(
        command, cwd=cwd, env=os.environ | own | environment, check=False, capture_output=True, text=True, timeout=120
    )


_STAND_IN = """#!{python}
import json, pathlib, sys
module = pathlib.Path(sys.argv[1]).stem.removeprefix("AnsiballZ_")
with pathlib.Path({log!r}).open("a") as log:
    log.write(module + "\\n")
print(json.dumps({answers!r}.get(module, {{"changed": False}})))
"""


def stand_in(folder: Path, name: str, **answers: dict[str, Any]) -> dict[str, Any]:
    """Variables of a host that runs no module: it notes the module's name in NAME.log, and gives the answer that is set
    for it."""
    own = {
        "ping": {"ping": "pong"},
        "setup": {"ansible_facts": FACTS},
        "stat": {"stat": {"exists": False}},
        "find": {"files": [], "matched": 0, "examined": 0},
    }
    own |= {module: {"rc": 0, "stdout": "", "stderr": ""} for module in ("command", "shell")}
    python = folder / f"{name}.python"
    python.write_text(_STAND_IN.format(python=sys.executable, log=str(folder / f"{name}.log"), answers=own | answers))
    python.chmod(0o755)
    return {
        "ansible_connection": "local",
        "ansible_become": False,
        "ansible_pipelining": False,
        "ansible_python_interpreter": str(python),
    }


def modules(folder: Path, name: str) -> list[str]:
    """What a stand-in was asked to run."""
    log = folder / f"{name}.log"
    return log.read_text().split() if log.exists() else []


@pytest.fixture(scope="session")
def roles() -> str:
    return str(ROOT / "roles")


@pytest.fixture(scope="session")
def preflight() -> SimpleNamespace:
    """The filters of preflight, and what they are made of."""
    parts = [load(f"roles/preflight/filter_plugins/preflight_{part}.py") for part in ("inventory", "hosts", "list")]
    return SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})


@pytest.fixture(scope="session")
def probe() -> ModuleType:
    return load("roles/preflight/library/preflight_probe.py")


@pytest.fixture(scope="session")
def operations() -> ModuleType:
    return load("playbooks/filter_plugins/operations.py")
