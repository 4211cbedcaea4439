"""`llm-ray doctor` on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_ray.cli import doctor as command
from llm_ray.doctor.finding import Finding
from llm_ray.doctor.network import PORTS


def test_the_real_command_says_what_this_machine_is(tmp_path: Path) -> None:
    environ = {**os.environ, "LLM_RAY_HOME": str(tmp_path), "http_proxy": "http://proxy.invalid:1", "no_proxy": ""}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "llm-ray"), "doctor", "--json"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    found: dict[str, dict[str, Any]] = {one["check"]: one for one in report["findings"]}
    assert (done.returncode, report["level"]) == (1, "problem")
    assert found["proxies"]["level"] == "problem"
    held = {one["values"]["port"] for one in report["findings"] if "(port" in one["check"]}
    assert held | set(found["free ports"]["values"]["free"]) == set(PORTS.values())
    assert found["cores"]["values"]["usable"] == len(os.sched_getaffinity(0))
    assert found["cores"]["values"]["counted"] == os.cpu_count()
    assert found["memory"]["values"]["total"] == psutil.virtual_memory().total
    assert found["swap"]["values"]["total"] == psutil.swap_memory().total
    assert found["shared memory"]["values"]["total"] == shutil.disk_usage("/dev/shm").total
    assert found["torch"]["values"]["installed"] == importlib.metadata.version("torch")
    assert found["Python"]["values"]["version"] == [*sys.version_info[:3]]
    assert found["home, models, runs, data"]["values"]["folder"] == str(tmp_path.resolve())
    assert all(bool(one["fix"]) == (one["level"] != "ok") for one in report["findings"])
    assert [*tmp_path.iterdir()] == []


def test_the_report_is_grouped_and_shows_fixes(capsys: pytest.CaptureFixture[str]) -> None:
    command._show(
        [
            Finding("Host", "CPU", "ok", "AMX"),
            Finding("Host", "clock", "note", "not synchronised", "timedatectl set-ntp true"),
            Finding("Network", "proxies", "problem", "caught", "export no_proxy=localhost"),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Host",
        "  ok       CPU      AMX",
        "  note     clock    not synchronised",
        "                    fix: timedatectl set-ntp true",
        "",
        "Network",
        "  problem  proxies  caught",
        "                    fix: export no_proxy=localhost",
        "",
        "1 problem(s), 1 note(s), 1 ok",
    ]
