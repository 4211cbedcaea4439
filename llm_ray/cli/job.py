"""The process of a finetune submitted with `llm_ray.app.jobs.submit`.

python -m llm_ray.cli.job RUNS NAME LOCK [detached]

It waits for its turn in the queue, then runs. LOCK is the file descriptor of a lock that shows others that this process
is alive. With `detached` it leaves its parent process, and that one's Ray.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path


def detach() -> None:
    """Leaves the parent process, which may be a Ray worker: Ray kills the children of its workers."""
    if os.fork():
        os._exit(0)
    forget_ray()


def forget_ray() -> None:
    """Removes the settings of the parent's Ray from the environment: its address, its token, and its limit of one
    compute thread."""
    for name in [name for name in os.environ if name.startswith("RAY_") or name == "OMP_NUM_THREADS"]:
        del os.environ[name]


def main(runs: Path, name: str, lock: int) -> int:
    """Runs the job; returns the exit code."""
    from llm_ray.app import job_process  # takes a second, by when the parent has exited
    from llm_ray.app.job_queue import LOG

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops training with a checkpoint
    os.set_inheritable(lock, False)
    command = job_process.wait_for_turn(runs, name)
    if command is None:
        return 0
    with (runs / name / LOG).open("ab") as log:
        for output in (1, 2):
            os.dup2(log.fileno(), output)
    sys.argv = shlex.split(command) or sys.argv  # recorded in the run's lineage
    from llm_ray.cli.terminal import Terminal

    return job_process.run(runs, name, Terminal())


if __name__ == "__main__":
    if sys.argv[4:] == ["detached"]:
        detach()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
