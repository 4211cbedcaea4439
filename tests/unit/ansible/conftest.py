"""Ansible's parts that are Python, loaded from where the roles have them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]


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
    folder: Path, inventory: dict[str, Any], *arguments: str, name: str = "preflight.yml", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the bundle's playbooks from here with this inventory, which is written to the folder."""
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(folder / "hosts.yml"), name, *arguments]
    own = {"ANSIBLE_CACHE_PLUGIN_CONNECTION": str(folder / "facts"), "ANSIBLE_FORCE_COLOR": "0"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | own | environment, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def roles() -> str:
    return str(ROOT / "roles")


@pytest.fixture(scope="session")
def preflight() -> ModuleType:
    return load("roles/preflight/filter_plugins/preflight.py")


@pytest.fixture(scope="session")
def probe() -> ModuleType:
    return load("roles/preflight/library/preflight_probe.py")


@pytest.fixture(scope="session")
def operations() -> ModuleType:
    return load("playbooks/filter_plugins/operations.py")
