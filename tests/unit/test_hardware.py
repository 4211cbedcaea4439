"""Precision follows the CPU's flags, and says why."""

from __future__ import annotations

import ctypes.util

import pytest

from llm_ray.hardware import choose_precision, cpu_flags, has_bf16, malloc_environment
from llm_ray.host import facts

AMX = frozenset({"avx512f", "avx512_bf16", "amx_bf16", "amx_tile"})
AVX512_BF16 = frozenset({"avx512f", "avx512_bf16"})
AVX2 = frozenset({"avx2", "fma"})


@pytest.mark.parametrize(
    ("wanted", "flags", "precision", "reason"),
    [
        ("auto", AMX, "bf16", "AMX"),
        ("auto", AVX512_BF16, "bf16", "AVX512-BF16"),
        ("auto", AVX2, "fp32", "emulate"),
        ("bf16", AVX2, "bf16", "emulates"),
        ("bf16", AMX, "bf16", "conf"),
        ("fp32", AMX, "fp32", "conf"),
    ],
)
def test_precision(wanted: str, flags: frozenset[str], precision: str, reason: str) -> None:
    chosen, why = choose_precision(wanted, flags)
    assert chosen == precision
    assert reason in why


def test_tiles_without_bf16_are_not_enough() -> None:
    assert has_bf16(frozenset({"amx_tile", "amx_int8"})) is None


def test_this_host_has_flags() -> None:
    assert "fpu" in cpu_flags() or "fp" in cpu_flags()


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("", AMX),
        ("DEFAULT", AMX),
        ("AVX512_CORE_AMX", AMX),
        ("avx512_core_bf16", AVX512_BF16),
        ("AVX512_CORE", {"avx512f"}),
        ("AVX2", {"avx512f"}),
    ],
)
def test_instructions_that_onednn_may_not_use_do_not_count(
    monkeypatch: pytest.MonkeyPatch, limit: str, left: frozenset[str]
) -> None:
    monkeypatch.setattr(facts, "read", lambda path: "flags : " + " ".join(sorted(AMX)))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_flags() == left


@pytest.mark.parametrize("given", ["", "libother.so.1"])
def test_a_malloc_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("LD_PRELOAD", given)
    assert malloc_environment() == {}


def test_glibcs_malloc_stays_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert malloc_environment() == {}


def test_the_smaller_tcmalloc_does_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", {"tcmalloc_minimal": "libtcmalloc_minimal.so.4"}.get)
    assert malloc_environment() == {"LD_PRELOAD": "libtcmalloc_minimal.so.4"}
