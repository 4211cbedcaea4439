"""What goes wrong around a finetune, through the real command: what the user sees, what is left behind, and how to go
on.

The command runs as its own process group with its own folder for temporary files, so that whatever it leaves behind is
found.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_ray.app.runs import stop_run
from llm_ray.runs.metrics import read_metrics
from llm_ray.train.checkpoint import list_checkpoints
from tests.waiting import until

LLM_RAY = Path(sys.executable).parent / "llm-ray"
PATIENCE = 420.0  # seconds: what serves beside it comes first
"""Seconds after which what is waited for does not come any more."""


class Command:
    """A running `llm-ray`, its output in files."""

    def __init__(self, bench: Bench, *arguments: str, **environment: str) -> None:
        self.stdout, self.stderr = (Path(tempfile.mkstemp(dir=bench.folder)[1]) for _ in range(2))
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [LLM_RAY, *arguments],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env=bench.environment | environment,
                process_group=0,
            )

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ctrl-C as a terminal does it: to every process of the group."""
        os.killpg(self.process.pid, number)

    def ends(self) -> tuple[int, str]:
        """Exit code, and what the user has seen."""
        code = self.process.wait(PATIENCE)
        seen = self.stderr.read_text()
        for chatter in ("Traceback", "FrameSummary", "(raylet", "ray::", "*** SIG"):
            assert chatter not in seen, seen
        return code, seen


class Bench:
    """A home, data and conf for one test, and what runs in it."""

    def __init__(self, folder: Path, temporary: Path, model: Path) -> None:
        self.folder, self.temporary = folder, temporary
        self.runs = folder / "home" / "runs"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "LLM_RAY_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(temporary),
        }
        rows = [{"prompt": f"What is code {n}?", "completion": f"Code {n} means stop."} for n in range(12)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.conf: dict[str, Any] = {
            "name": "trial",
            "stages": ["prepare", "train"],
            "model": {"base": str(model), "dtype": "fp32"},
            "data": {"train": str(folder / "rows.jsonl"), "validation": None, "max_length": 64},
            "runtime": {"cpus_per_worker": 1, "max_failures": 0},
            "tuning": {"lora": {"r": 1}},
            "training": {"max_steps": 8, "global_batch_size": 4, "precision": "fp32", "learning_rate": 1e-3},
            "checkpoint": {"every_steps": 1, "keep": 3},
        }

    def start(self, *arguments: str, name: str = "trial", **environment: str) -> Command:
        """`llm-ray finetune` with the conf."""
        (self.folder / "conf.yaml").write_text(json.dumps(self.conf))  # JSON is YAML
        return Command(
            self,
            "finetune",
            "--config",
            str(self.folder / "conf.yaml"),
            "--set",
            f"name={name}",
            *arguments,
            **environment,
        )

    def checkpoints(self, name: str = "trial") -> list[Path]:
        return list_checkpoints(self.runs / name / "checkpoint")

    def steps(self, name: str = "trial") -> list[int]:
        return [row["step"] for row in read_metrics(self.runs / name / "metrics.jsonl") if "loss" in row]

    def losses(self, name: str = "trial") -> list[float]:
        return [row["loss"] for row in read_metrics(self.runs / name / "metrics.jsonl") if "loss" in row]

    def state(self, name: str = "trial") -> str:
        """What `llm-ray runs list` says."""
        listed = subprocess.run(
            [LLM_RAY, "runs", "list", "--json", "--runs", str(self.runs)],
            capture_output=True,
            check=True,
            env=self.environment,
            timeout=60,
        )
        return next(run["state"] for run in json.loads(listed.stdout) if run["name"] == name)

    def processes(self) -> list[psutil.Process]:
        """Whatever was started under this bench and lives: told by the folder for temporary files, which is
        inherited."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == str(self.temporary) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def worker(self) -> int | None:
        """Process id of the training worker, once there is one."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    return process.pid
        return None

    def assert_nothing_left(self) -> None:
        until(lambda: not self.processes(), timeout=15)
        assert [p.name for p in self.temporary.glob("llm-ray-*") if not p.name.startswith("llm-ray-cores")] == []


@pytest.fixture
def bench(tmp_path: Path, smollm2: Path) -> Iterator[Bench]:
    temporary = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))  # short: sockets lie under it
    made = Bench(tmp_path, temporary, smollm2)
    yield made
    for process in made.processes():
        process.kill()
    shutil.rmtree(temporary, ignore_errors=True)


def test_a_killed_dry_run_leaves_no_process_computing(bench: Bench) -> None:
    def measuring() -> bool:
        """Whether the trial's process has loaded the model."""
        for process in bench.processes():
            with contextlib.suppress(psutil.Error):
                if process.ppid() == command.process.pid and process.memory_info().rss > 0.9e9:
                    return True
        return False

    command = bench.start("--dry-run")
    until(measuring)
    command.process.kill()
    command.process.wait()
    until(lambda: not bench.processes(), timeout=4)  # it measures for longer


@pytest.mark.long
def test_a_run_broken_off_in_every_way_has_each_step_once(bench: Bench) -> None:
    # Ctrl-C
    command = bench.start()
    until(lambda: len(bench.steps()) >= 1)
    command.interrupt()
    code, seen = command.ends()
    assert code == 130
    assert re.search(
        r"stopped at step \d of 8 as requested, with a checkpoint. Run the same command to continue from there", seen
    )
    assert bench.state() == "stopped"
    bench.assert_nothing_left()
    reached = bench.steps()
    assert bench.checkpoints()[-1].name == f"step_{reached[-1]:08d}"

    # SIGTERM
    command = bench.start()
    until(lambda: len(bench.steps()) > len(reached))
    command.process.terminate()
    code, seen = command.ends()
    assert (code, bench.state()) == (130, "stopped")
    assert "prepare: already done" in seen
    assert f"resuming from the checkpoint of step {reached[-1]}" in seen
    bench.assert_nothing_left()
    reached = bench.steps()

    # kill -9 of the driver; in the meantime another process is refused
    command = bench.start()
    until(lambda: len(bench.steps()) > len(reached))
    code, seen = bench.start().ends()
    assert code == 1
    assert re.search(rf"in use by process {command.process.pid} on \S+, since", seen)
    (session,) = (p.parent for p in bench.temporary.glob("llm-ray-*/token"))
    assert session.stat().st_mode & 0o777 == 0o700, "the token, and Ray's sockets, are closed to other users"
    command.process.kill()
    command.process.wait()
    until(lambda: not bench.processes(), timeout=30)
    assert bench.state() == "interrupted"

    code, seen = bench.start().ends()
    assert code == 0
    assert bench.state() == "done"
    assert bench.steps() == list(range(1, 9))
    bench.assert_nothing_left()


def test_stopped_by_another_process(bench: Bench) -> None:
    bench.conf["training"] |= {"max_steps": 12}
    stop = [LLM_RAY, "runs", "stop", "trial", "--runs", str(bench.runs)]
    command = bench.start()
    until(lambda: "prepare …" in command.stderr.read_text())
    assert (
        stop_run(bench.runs, "trial").state == "running"
    )  # from here: a command takes seconds to start, preparing does not last longer
    code, seen = command.ends()
    assert (code, "stopped before stage train as requested" in seen) == (130, True), seen

    command = bench.start()
    until(lambda: len(bench.checkpoints()) >= 1)
    told = subprocess.run(
        [*stop, "--wait", str(PATIENCE)],
        capture_output=True,
        text=True,
        check=True,
        env=bench.environment,
        timeout=2 * PATIENCE,
    )
    assert told.stdout.startswith("trial: stopped. trial: stopped at step ")
    code, seen = command.ends()
    assert (code, "with a checkpoint" in seen) == (130, True), seen
    reached = len(bench.steps())
    assert 1 <= reached < 12
    assert bench.state() == "stopped"

    code, seen = bench.start().ends()
    assert code == 0
    assert f"resuming from the checkpoint of step {reached}" in seen
    assert bench.steps() == list(range(1, 13))
    bench.assert_nothing_left()


@pytest.mark.parametrize(("moment", "number"), [("prepare", signal.SIGINT), ("start of Ray", signal.SIGTERM)])
def test_interrupted_before_training(bench: Bench, moment: str, number: signal.Signals) -> None:
    command = bench.start()
    if moment == "prepare":
        until(lambda: "prepare …" in command.stderr.read_text())
    else:
        until(lambda: any("raylet" in p.name() or "gcs_server" in p.name() for p in bench.processes()))
    command.interrupt(number)
    code, seen = command.ends()
    assert (code, seen.endswith("\nInterrupted.\n")) == (130, True), seen
    assert bench.state() == "stopped"
    bench.assert_nothing_left()


@pytest.mark.root
@pytest.mark.long
def test_a_full_disk(bench: Bench) -> None:
    disk = bench.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    try:
        bench.runs = disk
        bench.conf["paths"] = {"runs": str(disk)}
        command = bench.start()
        until(lambda: len(bench.checkpoints()) >= 1)
        filling = disk / "filling"
        with filling.open("wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 16))
        code, seen = command.ends()
        assert code == 1
        assert re.search(
            rf"([Nn]o space left.*{disk}|{disk}\S* could not be written.*[Nn]o space).*0.0 GiB.*free.*: free some space",
            seen,
        )
        kept = bench.checkpoints()[-1]
        bench.assert_nothing_left()

        filling.unlink()
        code, seen = bench.start().ends()
        assert code == 0
        assert f"resuming from the checkpoint of step {int(kept.name[5:])}" in seen
        assert bench.steps() == list(range(1, 9))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        pytest.param(
            "read-only",
            1,
            r"the run's folder \S+/trial cannot be written: Read-only file system: \S+ \(.* free\): fix .* or set paths.runs",
            marks=pytest.mark.root,
        ),
        ("a file in the way", 1, r"the run's folder \S+/trial cannot be written: Not a directory: \S+ \(.* free\)"),
        ("no model", 2, r"conf.yaml:1: model.base: no such folder: \S+/nowhere"),
        (
            "half a model",
            1,
            r"half/model.safetensors is damaged or truncated \(1,000,000 bytes.*copy or download the model again",
        ),
    ],
)
def test_what_cannot_work_is_told_at_once(bench: Bench, smollm2: Path, fault: str, code: int, told: str) -> None:
    place = bench.folder / "place"
    if fault == "read-only":
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], check=True)
        bench.conf["paths"] = {"runs": str(place)}
    elif fault == "a file in the way":
        place.touch()
        bench.conf["paths"] = {"runs": str(place)}
    elif fault == "no model":
        bench.conf["model"]["base"] = str(bench.folder / "nowhere")
    else:
        half = bench.folder / "half"
        shutil.copytree(smollm2, half, ignore=shutil.ignore_patterns("*.safetensors"))
        with (smollm2 / "model.safetensors").open("rb") as whole:
            (half / "model.safetensors").write_bytes(whole.read(1_000_000))
        bench.conf["model"]["base"] = str(half)
    try:
        ended, seen = bench.start().ends()
    finally:
        if fault == "read-only":
            subprocess.run(["umount", place], check=True)
    assert ended == code
    assert re.search(told, seen), seen
    assert "prepare" not in seen
    bench.assert_nothing_left()


def test_a_worker_without_memory(bench: Bench) -> None:
    """Ray's memory monitor ends workers when the host's memory is used beyond a share: here one that is always
    exceeded."""
    code, seen = bench.start(RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="500").ends()
    assert code == 1
    assert re.search(
        r"killed because the host \S+ \(\S+ used / \S+\) ran out of memory. Lower training.micro_batch_tokens or data.max_length",
        seen,
    ), seen
    assert len(seen.splitlines()) < 12, seen
    bench.assert_nothing_left()


@pytest.mark.long
def test_a_worker_that_dies_too_often_and_ways_on_from_a_damaged_checkpoint(bench: Bench) -> None:
    bench.conf["runtime"]["max_failures"] = 1
    bench.conf["training"]["max_steps"] = 12
    command = bench.start()
    killed: list[int] = []
    while len(killed) < 2:
        until(lambda: bench.worker() not in (None, *killed) and len(bench.checkpoints()) > len(killed))
        killed.append(bench.worker() or 0)
        os.kill(killed[-1], signal.SIGKILL)
    code, seen = command.ends()
    assert code == 1
    assert re.search(
        r"worker 0 of trial died: .*run the same command to continue.*This was failure 2; runtime.max_failures is 1",
        seen,
    ), seen
    assert bench.state() == "failed"
    bench.assert_nothing_left()

    # The newest checkpoint is damaged.
    earlier, newest = bench.checkpoints()[-2:]
    os.truncate(newest / "__0_0.distcp", 1000)
    shutil.copytree(bench.runs / "trial", bench.runs / "other")
    code, seen = bench.start().ends()
    assert code == 1
    assert re.search(rf"the checkpoint {newest} is damaged.*Go on from an earlier one \(--resume {earlier}\)", seen), (
        seen
    )

    # Both ways that the message names work, and keep what they do not go on from.
    ways = [bench.start("--resume", str(earlier)), bench.start("--resume", "no", name="other")]
    for name, command in zip(("trial", "other"), ways, strict=True):
        code, seen = command.ends()
        assert code == 0
        assert bench.steps(name) == list(range(1, 13))
        (aside,) = (bench.runs / name).glob("checkpoint.*")
        assert newest.name in [p.name for p in aside.iterdir()]
        assert f"were moved to {aside}" in seen
    assert bench.losses("trial") == pytest.approx(bench.losses("other"), rel=1e-4)
    bench.assert_nothing_left()

    # A changed conf is refused; a done run is left alone, unless by force.
    code, seen = bench.start("--set", "training.seed=7").ends()
    assert (code, "training.seed: 42 -> 7" in seen) == (1, True), seen
    code, seen = bench.start().ends()
    assert (code, "train: already done with the same inputs, skipped" in seen) == (0, True), seen
    code, seen = bench.start("--force", "--set", "training.max_steps=1").ends()
    assert (code, bench.steps()) == (0, [1])
    assert len(list((bench.runs / "trial").glob("checkpoint.*"))) == 2
