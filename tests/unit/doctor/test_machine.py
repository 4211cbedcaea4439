"""What doctor says of a host's facts: the level, what is wrong, and the fix."""

from __future__ import annotations

import pytest

from llm_ray.doctor import machine
from llm_ray.doctor.finding import Finding

_GIB = 2**30
_AMX = {"avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"}
_DEBIAN = {"ID": "debian", "VERSION_ID": "12"}


def _sizes(**changed: int) -> dict[str, int]:
    return {"MemTotal": 64 * _GIB, "MemFree": _GIB, "MemAvailable": 40 * _GIB, "SwapTotal": 0, "SwapFree": 0} | changed


@pytest.mark.parametrize(
    ("found", "level", "text", "fix"),
    [
        (machine.cpu(_AMX), "ok", "AMX: training.precision auto takes bf16", ""),
        (machine.cpu({"avx2", "avx512f"}), "note", "AVX512: training.precision auto takes fp32", "AMX (4th generation"),
        (machine.cpu({"avx2"}), "note", "AVX2: training.precision auto takes fp32", "pass the host's CPU through"),
        (machine.cpu({"sse4_2"}), "problem", "lacks avx2", "-cpu host"),
        (machine.cores(16, 16, None, 8), "ok", "16 CPUs on 8 cores, all of which Ray counts", ""),
        (machine.cores(16, 16, 16.0, 16), "ok", "16 cores", ""),
        (machine.cores(16, 4, None, 4), "note", "count 16 CPUs, but this process has an affinity of 4", "cpus_per_worker=4"),
        (machine.cores(16, 16, 2.5, 8), "note", "a quota of 2.5 CPUs", "ray_node_cpus: 2"),
        (machine.cores(16, 16, 0.5, 8), "problem", "a CPU quota of 0.5", "docker run --cpus 2"),
        (machine.cores(1, 1, None, 1), "problem", "1 CPU to run on", "more CPUs"),
        (machine.memory(_sizes(), None), "ok", "64.0 GiB, 40.0 GiB available; Ray's object store takes 128 MiB", ""),
        (machine.memory(_sizes(), 8 * _GIB), "ok", "64.0 GiB, of which the control group allows 8.0 GiB", ""),
        (machine.memory(_sizes(), _GIB), "problem", "allows 1.0 GiB", "docker run --memory"),
        (machine.memory(_sizes(MemTotal=2 * _GIB), None), "problem", "only 2.0 GiB", "at least 3.5 GiB"),
        (machine.memory(_sizes(MemAvailable=_GIB), None), "note", "only 1.0 GiB are available", "ps -eo"),
        (machine.shared_memory(32 * _GIB, 31 * _GIB, 64 * _GIB), "ok", "32.0 GiB, 31.0 GiB free", ""),
        (machine.shared_memory(2**26, 2**26, 64 * _GIB), "problem", "64 MiB of 64 MiB are free", "--shm-size 1g"),
        (machine.shared_memory(8 * _GIB, 2**26, 64 * _GIB), "problem", "64 MiB of 8.0 GiB are free", "ls -l /dev/shm"),
        (machine.shared_memory(_GIB, _GIB, 64 * _GIB), "note", "not for a cluster's node", "remount,size=4G"),
        (machine.allocator(None, "libtcmalloc.so.4", [], _DEBIAN), "ok", "tcmalloc (libtcmalloc.so.4)", ""),
        (machine.allocator("/x/libtcmalloc.so.4", None, [], _DEBIAN), "ok", "by LD_PRELOAD (/x/", ""),
        (machine.allocator("", "libtcmalloc.so.4", [], _DEBIAN), "note", "is set to nothing", "unset LD_PRELOAD"),
        (machine.allocator("libjemalloc.so.2", "libtcmalloc.so.4", [], _DEBIAN), "note", "is libjemalloc.so.2, so that", "unset LD_PRELOAD"),
        (machine.allocator("/no.so", None, ["/no.so"], _DEBIAN), "problem", "cannot be loaded, so that every program complains: /no.so", "unset LD_PRELOAD"),
        (machine.allocator(None, None, [], _DEBIAN), "note", "not installed", "apt-get install libgoogle-perftools4"),
        (machine.allocator(None, None, [], {"ID": "debian", "VERSION_ID": "13"}), "note", "not installed", "install libgoogle-perftools4t64"),
        (machine.allocator(None, None, [], {"ID": "ubuntu", "VERSION_ID": "24.04"}), "note", "not installed", "libgoogle-perftools4t64"),
        (machine.allocator(None, None, [], {"ID": "rocky", "ID_LIKE": "rhel centos fedora"}), "note", "not installed", "gperftools-libs"),
        (machine.open_files(1024, 524288), "ok", "limit 65536", ""),
        (machine.open_files(-1, -1), "ok", "limit none", ""),
        (machine.open_files(1024, 1024), "problem", "at most 1024 open files", "nofile 65536"),
        (machine.tasks(1000, None, False), "problem", "at most 1000 processes and threads of this user", "nproc 65536"),
        (machine.tasks(1000, None, True), "ok", "limit none", ""),
        (machine.tasks(-1, 512, True), "problem", "in this control group", "--pids-limit -1"),
        (machine.tasks(63000, 9000, False), "ok", "limit 9000", ""),
        (machine.swap(_sizes()), "ok", "none", ""),
        (machine.swap(_sizes(SwapTotal=8 * _GIB, SwapFree=7 * _GIB)), "ok", "1.0 GiB of 8.0 GiB used", ""),
        (machine.swap(_sizes(SwapTotal=8 * _GIB, SwapFree=_GIB)), "note", "7.0 GiB are swapped out", "swapoff -a"),
        (machine.huge_pages("always [madvise] never"), "ok", "madvise", ""),
        (machine.huge_pages("always madvise [never]"), "note", "switched off", "echo madvise >"),
        (machine.clock(True), "ok", "synchronised", ""),
        (machine.clock(False), "note", "not synchronised", "timedatectl set-ntp true"),
        (machine.clock(None), "note", "may not be asked", "timedatectl set-ntp true"),
    ],
)  # fmt: skip
def test_a_host(found: Finding, level: str, text: str, fix: str) -> None:
    assert found.level == level
    assert text in found.text
    assert fix in found.fix
    assert bool(found.fix) == (found.level != "ok")


def test_a_kernel_without_huge_pages() -> None:
    assert machine.huge_pages("") is None
