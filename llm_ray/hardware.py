"""What this host's CPU computes fast, and the resulting settings for training: precision, threads, memory
allocation."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llm_ray.host import facts

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]


def cpu_flags() -> frozenset[str]:
    """Instruction set flags of this host's CPU, as Linux names them."""
    return frozenset(facts.cpu_flags(facts.read("/proc/cpuinfo")))


def has_bf16(flags: frozenset[str]) -> str | None:
    """The instructions that multiply bf16 in hardware, or None."""
    return "AMX" if {"amx_bf16", "amx_tile"} <= flags else "AVX512-BF16" if "avx512_bf16" in flags else None


def choose_precision(wanted: Literal["auto", "fp32", "bf16"], flags: frozenset[str]) -> tuple[Precision, str]:
    """The precision of matrix products and the reason for it."""
    hardware = has_bf16(flags)
    if wanted == "auto":
        return (
            ("bf16", f"the CPU has {hardware}")
            if hardware
            else ("fp32", "the CPU has neither AMX nor AVX512-BF16: it would emulate bf16, which is slower than fp32")
        )
    if wanted == "bf16" and not hardware:
        return (
            "bf16",
            "set in the conf; the CPU has neither AMX nor AVX512-BF16 and emulates it, which is slower than fp32",
        )
    return wanted, "set in the conf"


def torch_dtype(name: Precision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def malloc_environment() -> dict[str, str]:
    """Environment that starts a process with tcmalloc in place of glibc's malloc, which fragments under the large blocks
    of a training step. Empty where tcmalloc is not installed (Debian: libgoogle-perftools4), and where LD_PRELOAD is
    set already, even to nothing."""
    library = None if "LD_PRELOAD" in os.environ else find_tcmalloc()
    return {"LD_PRELOAD": library} if library else {}


def find_tcmalloc() -> str | None:
    """The file name of the tcmalloc that is installed, the whole or the smaller one."""
    return ctypes.util.find_library("tcmalloc") or ctypes.util.find_library("tcmalloc_minimal")


def return_freed_memory() -> None:
    """Make malloc return large blocks to the kernel as soon as they are freed.

    By default glibc raises the size from which it does so with every block freed, up to 32 MiB, and keeps what is below
    in as many arenas as there are threads: the weights that FSDP gathers and drops layer by layer would pile up.
    """
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)


def keep_freed_memory() -> None:
    """Make malloc keep what a step frees for the next step.

    A step allocates and frees the same large blocks again and again; glibc gives each back to the kernel, which zeroes
    every page anew. See mallopt(3): M_MMAP_MAX 0 and a trim threshold above a step's memory keep the pages.
    """
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` begin anew. See proc(5), clear_refs; where that may not be written, the peak is the
    process's from its start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most resident memory that this process has had, in bytes."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
