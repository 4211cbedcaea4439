"""Every role is whole, its README is as generated, and its argument_specs say the truth about its defaults."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
ROLES = sorted(path.parents[1] for path in ROOT.glob("roles/*/meta/argument_specs.yml"))
each_role = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


def _specs(role: Path) -> dict[str, Any]:
    entries: dict[str, Any] = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    return entries


def _literal(jinja: str) -> Any:
    """A Jinja literal; in YAML between single quotes its own are doubled."""
    return yaml.safe_load(jinja.replace("''", "'") if len(jinja) > 2 else jinja)


def _words(value: Any) -> Any:
    """A default without its line breaks, so that one may be folded where the other is not."""
    return " ".join(value.split()) if isinstance(value, str) else value


def test_every_folder_in_roles_has_specs() -> None:
    assert [role.name for role in ROLES] == sorted(
        folder.name for folder in (ROOT / "roles").iterdir() if any(folder.rglob("*.yml"))
    )


@each_role
def test_a_role_has_what_every_role_has(role: Path) -> None:
    files = [
        "defaults/main.yml",
        "handlers/main.yml",
        "meta/main.yml",
        "tasks/main.yml",
        "tasks/validate.yml",
        "tasks/remove.yml",
    ]
    assert [file for file in files if not (role / file).is_file()] == []
    assert {"main", "validate", "remove"} <= set(_specs(role))


@each_role
def test_every_default_is_as_its_spec_says(role: Path) -> None:
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text()) or {}
    options = {name: spec for name, spec in (_specs(role)["main"].get("options") or {}).items() if "default" in spec}
    assert {name: _words(value) for name, value in defaults.items()} == {
        name: _words(spec["default"]) for name, spec in options.items()
    }


@each_role
def test_every_option_has_its_role_s_prefix_a_type_and_a_description(role: Path) -> None:
    for entry in _specs(role).values():
        for name, spec in (entry.get("options") or {}).items():
            assert name.startswith((f"{role.name}_", "llm_ray_")), name
            assert spec["type"], name
            assert spec["description"], name


@each_role
def test_the_cluster_s_variables_have_one_default(role: Path) -> None:
    cluster = _specs(ROOT / "roles/preflight")["cluster"]["options"]
    used = [
        found
        for file in role.rglob("*")
        if file.suffix in (".yml", ".j2")
        for found in re.findall(r"\b(llm_ray_\w+) \| default\(([^()]*)\)", file.read_text())
    ]
    for name, literal in used:
        assert name in cluster, f"{role.name} uses {name}, which preflight's entry point cluster does not declare"
        assert _literal(literal) == cluster[name]["default"], f"{role.name}: {name} | default({literal})"


def test_the_readmes_are_as_generated() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/role-readmes", "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_tasks_of_an_include_are_there() -> None:
    missing = []
    for role in ROLES:
        for file in role.glob("*/*.yml"):
            for name in re.findall(r"(?:include|import)_tasks: ([\w-]+\.yml)", file.read_text()):
                if not (role / "tasks" / name).is_file():
                    missing.append(f"{file.relative_to(ROOT)}: {name}")
    assert missing == []


def _tasks(content: Any) -> Iterator[dict[str, Any]]:
    """The tasks of a file, those of its blocks and plays too."""
    for entry in content or []:
        yield entry
        for part in ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks", "handlers"):
            yield from _tasks(entry.get(part))


def test_no_collection_is_needed() -> None:
    files = [*ROOT.glob("*.yml"), *ROOT.glob("playbooks/*.yml"), *ROOT.glob("playbooks/tasks/*.yml")]
    files += [*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("roles/*/handlers/*.yml")]
    contents = [yaml.safe_load(file.read_text()) for file in files if file.name != "requirements.yml"]
    modules = {key for content in contents for task in _tasks(content) for key in task if "." in key}
    assert len(modules) > 20
    assert {module for module in modules if not module.startswith("ansible.builtin.")} == set()
    assert yaml.safe_load((ROOT / "requirements.yml").read_text()) == {"collections": []}


def test_tasks_of_this_machine_are_its_user_s() -> None:
    """A variable of the inventory is above the keyword become, and localhost has those of all hosts, too."""
    files = [*ROOT.glob("playbooks/*.yml"), *ROOT.glob("playbooks/tasks/*.yml"), *ROOT.glob("roles/*/tasks/*.yml")]
    local = [
        (f"{file.relative_to(ROOT)}: {task['name']}", (task.get("vars") or {}).get("ansible_become"))
        for file in files
        for task in _tasks(yaml.safe_load(file.read_text()))
        if task.get("delegate_to") == "localhost"
    ]
    assert len(local) > 15
    assert [name for name, become in local if become is not False] == []
