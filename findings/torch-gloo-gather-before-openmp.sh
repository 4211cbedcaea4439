#!/usr/bin/env bash
# torch 2.13.0 (CPU), a process group of gloo: any training on CPUs that writes a checkpoint by torch.distributed.checkpoint.
#
# Behaviour: one object of 40 kB or more that is gathered over gloo (all_gather_object, gather_object; a distributed checkpoint gathers its
# plan so) makes every later operation of the process on several threads slower, for good, with a single rank, too. Gloo copies what it
# gathered in a thread of its own. torch copies more than 32,768 elements in a parallel loop, so that the thread gets a team of OpenMP
# threads, which stays as long as the thread does. From then on OpenMP has more threads than there are cores, and GNU's runtime, which
# torch brings along, no longer spins between two parallel loops (300,000 rounds) but sleeps after 100: each loop waits for the kernel to
# wake its threads. GOMP_SPINCOUNT and OMP_WAIT_POLICY=active do not bring it back. 39,000 bytes or a call of
# torch.set_num_threads(1) before gloo's thread first computes do no harm. A LoRA step of 184 tokens took 1.7 times as long.
#
# Seen, on two cores:
#   sleeps for each of 200 loops: at first 0.0, after gathering 20000 bytes 0.0, after 100000 bytes 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cd "$folder"
env/bin/python - <<'PYTHON'
import os
import resource

import torch
import torch.distributed as dist

cores = len(os.sched_getaffinity(0))
assert cores > 1, "two cores are needed"
torch.set_num_threads(cores)
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/meeting", rank=0, world_size=1)
numbers = torch.ones(40_000 * cores)


def loops(count=200, rounds=20):
    """Sleeps of this process for each loop, in the round with the fewest: others may use the cores."""
    fewest = float("inf")
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        for _ in range(count):
            torch.neg(numbers, out=numbers)
        fewest = min(fewest, (resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before) / count)
    return fewest


def gather(size):
    for _ in range(8):  # gloo has two threads: whichever takes it
        dist.gather_object(bytes(size), [None])


loops()
first = loops()
gather(20_000)
small = loops()
gather(100_000)
large = loops()
dist.destroy_process_group()
print(
    f"sleeps for each of 200 loops: at first {first:.1f}, after gathering 20000 bytes {small:.1f}, "
    f"after 100000 bytes {large:.1f}"
)
assert first < 0.2 and small < 0.2 and large > 1, (first, small, large)
PYTHON
