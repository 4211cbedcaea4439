"""Threads of workers: gloo's threads must not use several OpenMP threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GATHER = """
import os, sys, torch, torch.distributed as dist
from llm_ray.train.workers import use_threads

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
use_threads(2)
torch.ones(1000, 1000).exp()
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    into = [None]
    dist.gather_object(bytes(100_000), into)
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
dist.destroy_process_group()
"""


def test_threads_of_the_process_group_stay_alone(tmp_path: Path) -> None:
    """A checkpoint gathers its plan; OpenMP threads created for that made all later steps slower."""
    ended = subprocess.run(
        [sys.executable, "-c", GATHER, f"{tmp_path}-meeting"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == ["2", "0"]


@pytest.mark.long
def test_they_do_where_the_machine_is_busy(tmp_path: Path) -> None:
    """One thread may then do all the work before the other wakes up."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        for number in range(3):
            test_threads_of_the_process_group_stay_alone(tmp_path / str(number))
    finally:
        for process in busy:
            process.kill()
            process.wait()
