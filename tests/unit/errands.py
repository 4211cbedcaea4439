"""Work to be done in another process, which imports it by name."""

from __future__ import annotations

import os
import subprocess
import time

from llm_ray.errors import ClusterError, ConfError
from llm_ray.progress import Reporter


def double(number: int, reporter: Reporter) -> int:
    reporter.line(f"doubling {number}")
    return 2 * number


def refuse(reporter: Reporter) -> None:
    raise ConfError("data.train: no such file")


def never(reporter: Reporter) -> None:
    reporter.line(str(os.getpid()))
    time.sleep(3600)


def die(reporter: Reporter) -> None:
    os._exit(3)


def leave(reporter: Reporter) -> None:
    """Begins a process, and fails."""
    child = subprocess.Popen(["sleep", "3600"])
    reporter.line(str(child.pid))
    raise ClusterError("the cluster is away")


def own_pid(reporter: Reporter) -> int:
    with reporter.bar("looking", 1) as bar:
        bar.update(1, 1)
    return os.getpid()
