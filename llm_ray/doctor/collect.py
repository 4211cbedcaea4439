"""Reads the facts of this host and runs all checks on them."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import llm_ray
from llm_ray import cores
from llm_ray.conf.section import conversion_folder
from llm_ray.doctor import machine, network, software, storage
from llm_ray.doctor.finding import Finding
from llm_ray.hardware import find_tcmalloc
from llm_ray.host import facts

_THP = "/sys/kernel/mm/transparent_hugepage/enabled"


def check_host(home: Path, environ: Mapping[str, str], ours: Collection[int] = ()) -> list[Finding]:
    """Runs all checks of this host.

    `home` is the folder of models, data and runs; `environ` the environment of the commands; `ours` the ids of the
    processes with which llm-ray serves here. A group whose facts cannot be read yields a note; the other groups still
    run.
    """
    found: list[Finding] = []
    groups: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("Host", lambda: _machine(environ)),
        ("Software", lambda: _software(environ)),
        ("Storage", lambda: _storage(home, environ)),
        ("Network", lambda: [*network.ports(facts.taken(network.PORTS, set()), ours), network.proxies(environ)]),
    )
    for group, checks in groups:
        try:
            for one in checks():
                found.append(one)
        except (OSError, ValueError, KeyError) as error:  # a container hides /proc, an unusual installation
            text = f"not all could be checked: {type(error).__name__}: {error}"
            found.append(
                Finding(group, "checks", "note", text, "run llm-ray doctor on the host itself, outside a container")
            )
    return found


def _machine(environ: Mapping[str, str]) -> Iterable[Finding]:
    limits = facts.limits(facts.read("/proc/self/cgroup"))
    sizes = facts.memory(facts.read("/proc/meminfo"))
    physical = len({core.core for core in cores.list_cores()})
    yield machine.cpu(facts.cpu_flags(facts.read("/proc/cpuinfo")))
    yield machine.cores(os.cpu_count() or 1, facts.usable_cpus(), limits.cpus, physical)
    yield machine.memory(sizes, limits.memory)
    yield machine.shared_memory(facts.shared_memory(), facts.free_disk(facts.SHARED_MEMORY), sizes["MemTotal"])
    preload = environ.get("LD_PRELOAD")
    yield machine.allocator(preload, find_tcmalloc(), refused(preload), _system())
    yield machine.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield machine.tasks(resource.getrlimit(resource.RLIMIT_NPROC)[0], limits.tasks, os.geteuid() == 0)
    yield machine.swap(sizes)
    if pages := machine.huge_pages(facts.read(_THP)):
        yield pages
    yield machine.clock(facts.clock_synchronised())


def refused(preload: str | None) -> list[str]:
    """Returns the libraries in LD_PRELOAD that ld.so cannot load."""
    program = shutil.which("true")
    if not preload or not program:
        return []
    done = subprocess.run([program], env={"LD_PRELOAD": preload}, capture_output=True, text=True, check=False)
    return [line.split("'")[1] for line in done.stderr.splitlines() if "cannot be preloaded" in line]


def _system() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _software(environ: Mapping[str, str]) -> Iterable[Finding]:
    setup, have = software.find_setup(Path(llm_ray.__file__).parent), software.installed()
    lock = setup.lock
    yield software.python(sys.version_info[:3], setup.prefix)
    there = {name: module for name, (module, _) in software.PACKAGES.items() if name in have}
    imported = software.import_all(there.values(), environ)
    for name, (module, _) in software.PACKAGES.items():
        yield software.package(name, have.get(name), lock, imported.get(module), setup)
    yield software.others(have, lock, setup)
    yield software.profile(setup, have)
    yield software.conversion(conversion_folder(environ), setup)


def _storage(home: Path, environ: Mapping[str, str]) -> Iterable[Finding]:
    mounts, user = facts.read("/proc/self/mountinfo"), os.geteuid()
    own = {"home": home} | {name: home / name for name in ("models", "runs", "data")}
    for folders, move in (
        (own, "export LLM_RAY_HOME=/larger/disk"),
        ({"temporary files": Path(environ.get("TMPDIR") or "/tmp")}, "export TMPDIR=/larger/disk"),  # noqa: S108
        ({"hub cache": storage.hub_cache(environ, Path.home())}, "export HF_HOME=/larger/disk"),
    ):
        for place in storage.find_places(folders, mounts):
            yield storage.storage(place, user, move)
