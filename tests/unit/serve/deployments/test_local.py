"""Which process serves on this machine is known by its number and its beginning, whatever becomes of the clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llm_ray.serve.deployments.local import LocalRay, _began, running, state_file


def _told(home: Path, pid: int, began: int) -> None:
    state_file(home).parent.mkdir(parents=True, exist_ok=True)
    state = {"pid": pid, "began": began, "address": "127.0.0.1:1", "token": "/token", "session": "/session"}
    state_file(home).write_text(json.dumps(state))


def test_it_is_found_after_the_clock_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _told(tmp_path, os.getpid(), _began(os.getpid()))
    assert running(tmp_path) == LocalRay(os.getpid(), _began(os.getpid()), "127.0.0.1:1", "/token", "/session")
    begins = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: begins + 63)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: begins + 63)
    assert running(tmp_path) is not None


def test_another_process_with_its_number_is_not_taken_for_it(tmp_path: Path) -> None:
    _told(tmp_path, os.getpid(), _began(os.getpid()) - 1)
    assert running(tmp_path) is None


def test_one_that_has_ended_serves_no_more(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        _told(tmp_path, process.pid, _began(process.pid))
        assert running(tmp_path) is not None
    assert running(tmp_path) is None


def test_nothing_serves_where_nothing_is_told(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    state_file(tmp_path).parent.mkdir()
    state_file(tmp_path).write_text('{"pid": 1')
    assert running(tmp_path) is None
