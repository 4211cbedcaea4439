"""`llm-ray doctor` on this machine, which is two nodes of a cluster."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import llm_ray
from llm_ray.cluster import LOOPBACK
from llm_ray.doctor.network import PORTS

# Two nodes on loopback, the command, and the end of both.
_CLUSTER = """
import subprocess, sys, tempfile
from ray.cluster_utils import Cluster
with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets lie in it
    node = {"num_cpus": 1, "object_store_memory": 2**27, "node_ip_address": "127.0.0.1", "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        code = subprocess.call([*sys.argv[1:], "--address", cluster.address])
    finally:
        cluster.shutdown()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def done(home: Path) -> subprocess.CompletedProcess[str]:
    proxy = {"http_proxy": "http://proxy.invalid:1", "no_proxy": "", "NO_PROXY": ""}
    command = [sys.executable, "-c", _CLUSTER, str(Path(sys.executable).parent / "llm-ray"), "doctor", "--json"]
    return subprocess.run(
        command,
        env={**os.environ, **LOOPBACK, **proxy, "LLM_RAY_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def findings(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.stdout, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return found


def test_it_says_what_this_machine_is(findings: list[dict[str, Any]], home: Path) -> None:
    found = {one["check"]: one for one in reversed(findings)}
    assert found["cores"]["values"]["usable"] == len(os.sched_getaffinity(0))
    assert found["cores"]["values"]["counted"] == os.cpu_count()
    assert found["memory"]["values"]["total"] == psutil.virtual_memory().total
    assert found["swap"]["values"]["total"] == psutil.swap_memory().total
    assert found["shared memory"]["values"]["total"] == shutil.disk_usage("/dev/shm").total
    assert found["torch"]["values"]["installed"] == importlib.metadata.version("torch")
    assert found["Python"]["values"]["version"] == [*sys.version_info[:3]]
    assert found["home, models, runs, data"]["values"]["folder"] == str(home.resolve())
    host = findings[: findings.index(found["proxies"]) + 1]
    held = {one["values"]["port"] for one in host if "(port" in one["check"]}
    assert held | set(found["free ports"]["values"]["free"]) == set(PORTS.values())


def test_a_problem_is_the_exit_code_and_all_that_is_not_ok_has_a_fix(
    done: subprocess.CompletedProcess[str], findings: list[dict[str, Any]]
) -> None:
    assert (done.returncode, json.loads(done.stdout)["level"]) == (1, "problem")
    (proxies,) = (one for one in findings if one["check"] == "proxies" and not one["host"])
    assert proxies["level"] == "problem"
    assert all(bool(one["fix"]) == (one["level"] != "ok") for one in findings)


def test_nothing_stays(done: subprocess.CompletedProcess[str], home: Path) -> None:
    assert [*home.iterdir()] == []


def test_the_other_node_is_checked_as_well(findings: list[dict[str, Any]]) -> None:
    versions, clocks = (one for one in findings if one["group"] == "Cluster")
    assert (versions["level"], clocks["level"]) == ("ok", "ok")
    assert versions["values"]["llm-ray"] == llm_ray.__version__
    assert versions["values"]["Python"] == platform.python_version()
    assert len(clocks["values"]) == 2
    here = [one["check"] for one in findings if one["group"] == "Host" and not one["host"]]
    there = [one["check"] for one in findings if one["group"] == "Host" and one["host"]]
    assert there == here
