"""Measures this machine's limits: memory bandwidth, and matrix products for each data type.

python -m benchmarks.league.limits --threads 2      # {"memory_gb_per_s": …, "gflops": {"fp32": …, "bf16": …, "int8": …}}

Multiplications and additions both count as operations, also of integers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import click

_BYTES = 512 * 2**20  # larger than any cache
_SIDE = 2048
_SECONDS = 1.0


@click.command()
@click.option("--threads", type=int, required=True)
def main(threads: int) -> None:
    """Print the best result of repeating each measurement for a second, as JSON."""
    import torch

    torch.set_num_threads(threads)
    block = torch.ones(_BYTES // 4)
    limits = {
        "memory_gb_per_s": _BYTES / _fastest(block.sum) / 1e9,  # only reads, as for weights
        "gflops": {
            "fp32": _product(torch.mm, torch.ones(_SIDE, _SIDE)),
            "bf16": _product(torch.mm, torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16)),
            "int8": _product(torch._int_mm, torch.ones(_SIDE, _SIDE, dtype=torch.int8)),
        },
    }
    print(json.dumps(limits))


def _product(multiply: Callable[..., object], square: object) -> float:
    return 2 * _SIDE**3 / _fastest(lambda: multiply(square, square)) / 1e9


def _fastest(call: Callable[[], object]) -> float:
    """Returns the seconds of the fastest call, after one to warm up."""
    call()
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


if __name__ == "__main__":
    main()
