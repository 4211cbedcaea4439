"""A server is stopped with all of its processes, and one that does not start is a reason in the results."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.league import quality, run
from benchmarks.league.processes import Launch, become_reaper, running
from benchmarks.league.run import Cell, League
from benchmarks.league.servers import SERVERS, LlamaCpp, Ours, Setting, Unavailable, Weights
from benchmarks.league.weights import Shape
from tests.waiting import until

# Leaves a process in another session behind, which computes a little, notes its number, and takes no notice of SIGTERM.
ORPHAN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while time.process_time() < 0.2:
            pass
        with open(sys.argv[1] + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        time.sleep(600)
    os._exit(0)
os.wait()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
time.sleep(600)
"""


@pytest.fixture
def reaper() -> Iterator[None]:
    become_reaper()
    yield
    ctypes.CDLL(None).prctl(36, 0)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    shape = Shape(parameters=1000, head=200, tied=True, kv_values=8)
    return Setting(tmp_path / "model", shape, None, None, tmp_path, at_once=4, context=100, kv_tokens=250)


def test_a_server_is_stopped_with_what_it_has_left_behind(reaper: None, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    with running(Launch((sys.executable, "-c", ORPHAN, str(told))), tmp_path / "log") as server:
        until(told.exists, "the orphan")
        orphan = psutil.Process(int(told.read_text()))
        assert {orphan.pid, server.process.pid} <= {process.pid for process in server.processes()}
        assert server.memory() > orphan.memory_full_info().uss
        assert server.cpu_seconds() > 0.1
    assert not psutil.pid_exists(orphan.pid)
    assert not psutil.pid_exists(server.process.pid)


def test_slots_share_the_room_for_keys_and_values(setting: Setting) -> None:
    command = LlamaCpp("q8_0").launch(setting, Path("m.gguf"), 1).command
    assert command[command.index("--parallel") + 1] == "2"
    assert command[command.index("--ctx-size") + 1] == "200"


def test_ours_is_deployed_with_what_is_kept_equal(setting: Setting) -> None:
    launch = Ours("vllm", "fp32").launch(setting, setting.model, 4711)
    conf = json.loads(Path(launch.command[launch.command.index("--config") + 1]).read_text())
    model = conf["models"]["m"]
    assert (model["max_model_len"], model["max_batch"], model["precision"]) == (100, 4, "fp32")
    assert model["kv_cache_gib"] * 2**30 == 250 * 8 * 4
    assert conf["endpoint"]["port"] == 4711


def test_llama_cpp_needs_a_gguf(setting: Setting) -> None:
    with pytest.raises(Unavailable, match="--gguf"):
        LlamaCpp("q8_0").prepare(setting)


@dataclass(frozen=True)
class Broken:
    """Ends as it starts, or is not there at all."""

    form: str = "fp32"
    arithmetic: str = "fp32"
    there: bool = True
    starts: list[int] = field(default_factory=list, compare=False)

    def prepare(self, setting: Setting) -> Weights:
        if not self.there:
            raise Unavailable("it is not installed")
        return Weights(setting.model, 4000, "none")

    def launch(self, setting: Setting, weights: Path, port: int) -> Launch:
        self.starts.append(port)
        return Launch((sys.executable, "-c", "raise SystemExit('MemoryError: too small')"))


def test_a_server_that_cannot_start_is_a_reason(
    reaper: None, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken()
    monkeypatch.setattr(run, "SERVERS", {"missing": Broken(there=False), "broken": broken})
    monkeypatch.setattr(quality, "tokens_of", lambda *_: [1, 2])
    monkeypatch.setattr(quality, "offline", lambda *_: 3.5)
    monkeypatch.setattr(run, "Prompts", lambda *_: None)
    monkeypatch.setattr(League, "_limits", lambda _: {"memory_gb_per_s": 1.0, "gflops": {}})
    results: dict[str, Any] = {"limits": [], "servers": {}}
    lines: list[str] = []
    cells = (Cell(1, 32, False),)
    League(
        setting, ("missing", "broken"), cells, 2, 8, tmp_path / "text", 2, tmp_path / "out", results, lines.append
    ).run()
    kept = json.loads((tmp_path / "out" / "league.json").read_text())["servers"]
    assert kept["missing"]["reason"] == "it is not installed"
    assert kept["broken"]["reason"] == "it ended while it started: MemoryError: too small"
    assert (kept["broken"]["perplexity"], len(results["limits"])) == (3.5, 2)
    assert len([port for port in broken.starts if port]) == 1  # not again in the second round


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--servers", "vllm-fp16"], "unknown server 'vllm-fp16'; the servers are ours-vllm-fp32"),
        (["--concurrency", "1,x"], "give positive integers"),
        (["--prompts", "0"], "give positive integers"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], reason: str) -> None:
    result = CliRunner().invoke(main, ["league", *arguments])
    assert result.exit_code == 2
    assert reason in result.output


def test_every_server_compares_with_a_limit_that_is_measured() -> None:
    assert {server.arithmetic for server in SERVERS.values()} == {"fp32", "bf16", "int8"}
