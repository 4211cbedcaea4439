"""Capabilities of this host's CPU, and the resulting training settings: precision and memory allocation."""

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


_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "amx_tile"})
_ONEDNN_BF16 = {"AVX512_CORE_BF16": {"avx512_bf16"}, "AVX512_CORE_FP16": {"avx512_bf16"}}
"""Values of ONEDNN_MAX_CPU_ISA with which oneDNN uses some of `_BF16_FLAGS`."""


def cpu_flags() -> frozenset[str]:
    """Returns the instruction set flags of this host's CPU, as Linux names them, without the bf16 instructions that the
    environment forbids oneDNN to use (ONEDNN_MAX_CPU_ISA), on which torch's matrix products run."""
    flags = frozenset(facts.cpu_flags(facts.read("/proc/cpuinfo")))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in ("", "ALL", "DEFAULT") or "AMX" in limit or limit.startswith("AVX10"):
        return flags
    return flags - (_BF16_FLAGS - _ONEDNN_BF16.get(limit, set()))


def has_bf16(flags: frozenset[str]) -> str | None:
    """Returns the name of the CPU's bf16 matrix instructions, or None."""
    return "AMX" if {"amx_bf16", "amx_tile"} <= flags else "AVX512-BF16" if "avx512_bf16" in flags else None


def choose_precision(wanted: Literal["auto", "fp32", "bf16"], flags: frozenset[str]) -> tuple[Precision, str]:
    """Returns the precision of matrix products and the reason for it."""
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
    """Returns environment variables that start a process with tcmalloc instead of glibc's malloc, which fragments under
    the large blocks of a training step. Empty if tcmalloc is not installed (Debian: libgoogle-perftools4) or LD_PRELOAD
    is set, even to nothing."""
    library = None if "LD_PRELOAD" in os.environ else find_tcmalloc()
    return {"LD_PRELOAD": library} if library else {}


def find_tcmalloc() -> str | None:
    """Returns the file name of the installed tcmalloc, full or minimal; None if there is none."""
    return ctypes.util.find_library("tcmalloc") or ctypes.util.find_library("tcmalloc_minimal")


def return_freed_memory() -> None:
    """Makes malloc return large blocks to the kernel as soon as they are freed.

    By default glibc raises this threshold with every freed block, up to 32 MiB, and keeps smaller blocks in per-thread
    arenas, where the weights that FSDP gathers and drops layer by layer would pile up.
    """
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)


def keep_freed_memory() -> None:
    """Makes malloc keep the memory that a step frees for the next step.

    A step allocates and frees the same large blocks repeatedly. By default glibc returns each to the kernel, which
    zeroes all pages again. See mallopt(3): M_MMAP_MAX 0 and a trim threshold above a step's memory keep the pages.
    """
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)


def forget_peak_memory() -> None:
    """Resets :func:`peak_memory`; see proc(5), clear_refs. If that is not permitted, the peak covers the whole
    process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
