"""The process of a finetune submitted with `llm_ray.app.jobs.submit`: python -m llm_ray.cli.job RUNS NAME LOCK
[detached]

It waits for its turn, and runs. LOCK is the number of the file that tells others, as long as it is open here, that this
process lives. With `detached` it is no child of the process that asked, and has nothing of that one's Ray.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path


def detach() -> None:
    """Leave the parent, which may be a worker of Ray's: Ray ends the children of its workers with them."""
    if os.fork():
        os._exit(0)
    forget_ray()


def forget_ray() -> None:
    """Have nothing of the Ray whose worker this process comes from: its address, its token, its one thread for
    computing are not meant for another."""
    for name in [name for name in os.environ if name.startswith("RAY_") or name == "OMP_NUM_THREADS"]:
        del os.environ[name]


def main(runs: Path, name: str, lock: int) -> int:
    """Returns the exit code."""
    from llm_ray.app import job_process  # a second, after which this process is nobody's child any more
    from llm_ray.app.job_queue import LOG

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends training with a checkpoint
    os.set_inheritable(lock, False)
    command = job_process.wait_for_turn(runs, name)
    if command is None:
        return 0
    with (runs / name / LOG).open("ab") as log:
        for output in (1, 2):
            os.dup2(log.fileno(), output)
    sys.argv = shlex.split(command) or sys.argv  # which the run's lineage tells
    from llm_ray.cli.terminal import Terminal

    return job_process.run(runs, name, Terminal())


if __name__ == "__main__":
    if sys.argv[4:] == ["detached"]:
        detach()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
