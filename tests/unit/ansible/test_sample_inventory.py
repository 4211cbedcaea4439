"""inventory/sample is as the roles' argument_specs say, and its variables can be set as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml

ROOT = Path(__file__).parents[3]
_FILE = ROOT / "inventory/sample/group_vars/all.yml"


def test_it_is_as_generated() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/sample-inventory", "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_with_every_mark_taken_away_it_is_yaml_with_every_variable(preflight: SimpleNamespace, roles: str) -> None:
    known = preflight.specs(roles)
    lines = re.findall(r"^# ((\w+): .*)$", _FILE.read_text(), re.M)
    values = yaml.safe_load("\n".join(line for line, name in lines if name in known))
    assert values == {name: spec.get("default") for name, spec in known.items()}


def test_its_hosts_pass_preflight(preflight: SimpleNamespace, roles: str) -> None:
    inventory = yaml.safe_load((ROOT / "inventory/sample/hosts.yml").read_text())
    groups = {name: list(inventory[name]["hosts"]) for name in preflight.GROUPS}
    hostvars = {
        host: variables or {}
        for name in reversed(preflight.GROUPS)
        for host, variables in inventory[name]["hosts"].items()
    }
    assert preflight.preflight_inventory(hostvars, groups, roles) == []
