"""What a host is, from the texts of its kernel."""

from __future__ import annotations

import ast
import os
import socket
import sys
from pathlib import Path

import psutil
import pytest

from llm_ray.host import facts

ROOT = Path(__file__).parents[3]


def _groups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_limits_of_cgroups_2_are_the_least_of_a_group_and_those_above(tmp_path: Path) -> None:
    root = _groups(
        tmp_path,
        {
            "a.slice/cpu.max": "150000 100000",
            "a.slice/b.scope/cpu.max": "max 100000",
            "a.slice/memory.max": "max",
            "a.slice/b.scope/memory.max": "2147483648",
            "a.slice/b.scope/pids.max": "512",
            "a.slice/pids.max": "400",
        },
    )
    assert facts.limits("0::/a.slice/b.scope\n", root) == facts.Limits(1.5, 2**31, 400)
    assert facts.limits("0::/a.slice\n", root) == facts.Limits(1.5, None, 400)
    assert facts.limits("0::/\n", root) == facts.Limits(None, None, None)


def test_limits_of_cgroups_1(tmp_path: Path) -> None:
    root = _groups(
        tmp_path,
        {
            "cpu/docker/1/cpu.cfs_quota_us": "50000",
            "cpu/docker/1/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/docker/1/memory.limit_in_bytes": "9223372036854771712",
            "memory/docker/memory.limit_in_bytes": "1073741824",
        },
    )
    text = "4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n0::/\n"
    assert facts.limits(text, root) == facts.Limits(0.5, 2**30, None)


def test_in_a_container_the_root_has_the_limits(tmp_path: Path) -> None:
    root = _groups(tmp_path, {"cpu.max": "200000 100000", "memory.max": "4294967296"})
    assert facts.limits("0::/system.slice/docker-1.scope\n", root) == facts.Limits(2.0, 2**32, None)


def test_memory() -> None:
    text = "MemTotal:       16384 kB\nMemAvailable:    8192 kB\nHugePages_Total:       0\n"
    assert facts.memory(text) == {"MemTotal": 2**24, "MemAvailable": 2**23}
    assert facts.total_memory() == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/srv/llm ray/models", facts.Mount("/srv/llm ray", "nfs4", "nas:/llm")),
        ("/srv/other", facts.Mount("/", "ext4", "/dev/vda")),
        ("/srv/llm ray", facts.Mount("/srv/llm ray", "nfs4", "nas:/llm")),
    ],
)
def test_the_file_system_that_a_path_is_in(path: str, mount: facts.Mount) -> None:
    text = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "40 22 0:51 / /srv/llm\\040ray rw,relatime - nfs4 nas:/llm rw,vers=4.2\n"
    )
    assert facts.mount_of(Path(path), text) == mount


def test_who_holds_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = facts.taken({"endpoint": port}, set())
        assert (found["port"], found["pid"]) == (port, os.getpid())
    assert facts.taken({"endpoint": port}, set()) == []


def test_whether_the_clock_is_synchronised_can_be_asked() -> None:
    assert facts.clock_synchronised() in (True, False)


def test_ansible_can_bring_it_to_hosts_where_nothing_of_ours_is_installed() -> None:
    link = ROOT / "roles/preflight/module_utils/host_facts.py"
    assert link.resolve() == Path(facts.__file__).resolve()
    tree = ast.parse(link.read_text(), feature_version=(3, 9))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert facts.existing(tmp_path / "a/b") == tmp_path
    (tmp_path / "file").touch()
    assert facts.existing(tmp_path / "file/below") == tmp_path
