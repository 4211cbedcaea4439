"""Processes of one host do not share cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llm_ray.cores import background, list_cores

CLAIM = """
import os, sys
from llm_ray.cores import bind
threads, text = bind(int(sys.argv[1]))
print(threads, sorted(os.sched_getaffinity(0)), text, sep="|", flush=True)
sys.stdin.read()
"""
SCHEDULED = """
import os
from llm_ray.cores import foreground
before = os.sched_getscheduler(0)
foreground()
print(before, os.sched_getscheduler(0))
"""


class Claimer:
    def __init__(self, count: int, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        assert self.process.stdout
        threads, cpus, self.text = self.process.stdout.readline().strip().split("|")
        self.threads, self.cpus = int(threads), cpus

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_two_processes_get_different_cores_and_a_third_none_until_one_dies(tmp_path: Path) -> None:
    everything = len(os.sched_getaffinity(0))
    first = Claimer(1, tmp_path)
    second = Claimer(everything - 1, tmp_path)
    third = Claimer(1, tmp_path)
    try:
        assert first.cpus != second.cpus
        assert "not bound" in third.text
        assert third.threads == 1
        first.kill()
        fourth = Claimer(1, tmp_path)
        assert fourth.cpus == first.cpus
        fourth.kill()
    finally:
        for claimer in (first, second, third):
            claimer.kill()


def test_first_threads_of_cores_come_before_their_siblings() -> None:
    cores = list_cores()
    assert sorted(core.cpu for core in cores) == sorted(os.sched_getaffinity(0))
    for node in {core.numa_node for core in cores}:
        physical = [core.core for core in cores if core.numa_node == node]
        distinct = len(set(physical))
        assert len(set(physical[:distinct])) == distinct


def test_what_ray_starts_does_not_interrupt_what_computes() -> None:
    with background():
        shown = subprocess.run(
            [sys.executable, "-c", SCHEDULED],
            capture_output=True,
            text=True,
            check=True,
        )
    assert shown.stdout.split() == [str(os.SCHED_BATCH), str(os.SCHED_OTHER)]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
