"""Starts, measures and stops a server with all of its processes.

become_reaper()
with running(launch, log) as server:
    server.memory(), server.cpu_seconds()

Ray and vLLM start processes in sessions of their own, some of which outlive their parent. A child subreaper (prctl(2))
adopts those, so that a server's processes are always descendants of this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

STOP_SECONDS = 60.0
"""Time for a server to end after SIGTERM, before its processes are killed."""
_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Launch:
    """A command, and additions to its environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Running:
    """A started server. `others` are processes that existed before."""

    process: psutil.Popen
    others: frozenset[psutil.Process]

    def processes(self) -> list[psutil.Process]:
        """Returns the server's live processes."""
        return [
            process
            for process in psutil.Process().children(recursive=True)
            if process not in self.others and _alive(process)
        ]

    def memory(self) -> int:
        """Returns the memory of all its processes in bytes, as proportional set sizes, which count shared pages
        once."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # the process has just ended
                total += process.memory_full_info().pss
        return total

    def cpu_seconds(self) -> float:
        """Returns the CPU time of all its processes so far, including ended ones that their parent has waited for."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    @property
    def ended(self) -> bool:
        """Whether the command itself has ended."""
        return self.process.poll() is not None


def become_reaper() -> None:
    """Makes this process, instead of init, adopt orphaned descendants."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)


@contextlib.contextmanager
def running(launch: Launch, log: Path) -> Iterator[Running]:
    """Runs the server with its output in `log`, and stops all of its processes on exit. Raises OSError if the command
    cannot be started."""
    others = frozenset(psutil.Process().children(recursive=True))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # In its own session: Ctrl-C goes only to the league, which stops its servers one by one.
        process = psutil.Popen(
            launch.command,
            env={**os.environ, **launch.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Running(process, others)
    try:
        yield server
    finally:
        _stop(server)


def _stop(server: Running) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        server.process.send_signal(signal.SIGTERM)
    try:
        with contextlib.suppress(psutil.TimeoutExpired):
            server.process.wait(STOP_SECONDS)
    finally:  # also after a second Ctrl-C
        while left := server.processes():  # a killed process may have started another
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
