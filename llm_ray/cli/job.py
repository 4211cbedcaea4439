"""The process of a finetune submitted with `llm_ray.app.jobs.submit`: python -m llm_ray.cli.job RUNS NAME LOCK

It waits for its turn, and runs. LOCK is the number of the file that tells others, as long as it is open here, that this
process lives.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

from llm_ray.app import jobs


def main(runs: Path, name: str, lock: int) -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends training with a checkpoint
    os.set_inheritable(lock, False)
    command = jobs.wait_for_turn(runs, name)
    if command is None:
        return 0
    with (runs / name / jobs.LOG).open("ab") as log:
        for output in (1, 2):
            os.dup2(log.fileno(), output)
    sys.argv = shlex.split(command) or sys.argv  # which the run's lineage tells
    from llm_ray.cli.terminal import Terminal

    return jobs.run(runs, name, Terminal())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
