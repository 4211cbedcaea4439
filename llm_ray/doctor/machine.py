"""The host itself: CPU, memory, limits and the clock."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from llm_ray.cluster import OBJECT_STORE_BYTES
from llm_ray.doctor.finding import Finding, gib
from llm_ray.hardware import choose_precision
from llm_ray.host import rules

_GROUP = "Host"
# Ray's processes, engines and data workers together start hundreds of threads and open as many files.
_FEW_TASKS = 2048
_FEW_FILES, _ENOUGH_FILES = 4096, 65536  # Ray warns below the first, and raises its limit to the second if permitted
_LITTLE_FREE = 2 * rules.GIB  # roughly the need of the quickstart's finetune
CLUSTER_STORE_GIB = 2  # default of ray_node_object_store_gib


def cpu(flags: Collection[str]) -> Finding:
    """Checks the CPU's instruction sets, given the flags of /proc/cpuinfo."""
    values = {"flags": sorted(flag for flag in flags if flag.startswith(("avx", "amx")))}
    if missing := rules.missing_flags(flags):
        text = f"the CPU lacks {', '.join(missing)}, and torch and vLLM are built for it: they would crash"
        fix = (
            "use a host with AVX2; in a virtual machine, pass the host's CPU through (qemu: -cpu host, libvirt: "
            "<cpu mode='host-passthrough'/>)"
        )
        return Finding(_GROUP, "CPU", "problem", text, fix, values)
    precision, reason = choose_precision("auto", frozenset(flags))
    best = "AMX" if "amx_tile" in flags else "AVX512" if "avx512f" in flags else "AVX2"
    if precision == "bf16":
        text = f"{best}: training.precision auto takes bf16 ({reason})"
        return Finding(_GROUP, "CPU", "ok", text, values=values)
    fix = (
        "nothing to set: for bf16, which is several times as fast, use a Xeon with AMX (4th generation or later); in a "
        "virtual machine, pass the host's CPU through"
    )
    return Finding(_GROUP, "CPU", "note", f"{best}: training.precision auto takes fp32 ({reason})", fix, values)


def cores(counted: int, usable: int, quota: float | None, physical: int) -> Finding:
    """Compares the logical CPUs that a local Ray would count with those that this process may use.

    `usable` is the affinity mask; `quota` the CPU limit of control groups; `physical` the cores behind the usable CPUs.
    """
    share = usable if quota is None else min(usable, max(1, math.floor(quota)))
    values = {"counted": counted, "usable": usable, "quota": quota, "physical": physical}
    if share < rules.MIN_CORES:
        why = f"a CPU quota of {quota:g}" if quota is not None and quota < usable else f"{usable} CPU to run on"
        fix = (
            f"give it at least {rules.MIN_CORES}: docker run --cpus {rules.MIN_CORES}, systemctl set-property UNIT "
            f"CPUQuota={rules.MIN_CORES * 100}%, taskset, or more CPUs for the virtual machine"
        )
        return Finding(_GROUP, "cores", "problem", f"this process has {why}", fix, values)
    threads = f"{usable} CPUs on {physical} cores" if physical < usable else f"{usable} cores"
    if share < counted:
        why = f"a quota of {quota:g} CPUs" if quota is not None and quota < usable else f"an affinity of {usable} CPUs"
        text = f"Ray on this machine would count {counted} CPUs, but this process has {why}: workers would wait for each other"
        fix = (
            f"llm-ray finetune … --set runtime.cpus_per_worker={share} (divided by runtime.workers); on a cluster's "
            f"node, ray_node_cpus: {share}"
        )
        return Finding(_GROUP, "cores", "note", text, fix, values)
    return Finding(_GROUP, "cores", "ok", f"{threads}, all of which Ray counts", values=values)


def memory(sizes: Mapping[str, int], limit: int | None) -> Finding:
    """Checks the memory. `sizes` are from /proc/meminfo, in bytes; `limit` is the control group's, in bytes."""
    total, available = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
    usable = total if limit is None else min(total, limit)
    values = {"total": total, "available": available, "limit": limit, "object_store": OBJECT_STORE_BYTES}
    of = gib(total) if usable == total else f"{gib(total)}, of which the control group allows {gib(usable)}"
    if usable / rules.GIB < rules.MIN_MEMORY_GIB:
        fix = (
            f"give it at least {rules.MIN_MEMORY_GIB} GiB: docker run --memory, systemctl set-property UNIT MemoryMax=, "
            "or more memory for the machine"
        )
        return Finding(_GROUP, "memory", "problem", f"only {of}", fix, values)
    if min(available, usable) < _LITTLE_FREE:
        fix = "end what takes it: ps -eo pid,user,rss,args --sort=-rss | head; llm-ray serve stop --all"
        return Finding(_GROUP, "memory", "note", f"{of}, but only {gib(available)} are available", fix, values)
    text = f"{of}, {gib(available)} available; Ray's object store takes {gib(OBJECT_STORE_BYTES)} of it in a local run"
    return Finding(_GROUP, "memory", "ok", text, values=values)


def shared_memory(total: int, free: int, memory: int) -> Finding:
    """Checks shared memory (/dev/shm), which holds Ray's objects. All sizes are in bytes; `memory` is the host's."""
    values = {"total": total, "free": free}
    store = OBJECT_STORE_BYTES / rules.GIB
    if rules.store_fault(store, free / rules.GIB, memory / rules.GIB) == "shm":
        text = (
            f"{gib(free)} of {gib(total)} are free, and Ray's object store takes {gib(OBJECT_STORE_BYTES)}: it would be "
            "put on disk, which is slow"
        )
        fix = (
            "mount -o remount,size=1G /dev/shm; in a container, docker run --shm-size 1g"
            if total < 2 * OBJECT_STORE_BYTES
            else "remove what lies there: ls -l /dev/shm"
        )
        return Finding(_GROUP, "shared memory", "problem", text, fix, values)
    if rules.store_fault(CLUSTER_STORE_GIB, total / rules.GIB, memory / rules.GIB):
        text = f"{gib(total)}: enough for local runs, not for a cluster's node, which takes {CLUSTER_STORE_GIB} GiB"
        fix = "before this host joins a cluster: ray_node_object_store_gib: 1, or mount -o remount,size=4G /dev/shm"
        return Finding(_GROUP, "shared memory", "note", text, fix, values)
    return Finding(_GROUP, "shared memory", "ok", f"{gib(total)}, {gib(free)} free", values=values)


def allocator(preload: str | None, library: str | None, refused: Sequence[str], system: Mapping[str, str]) -> Finding:
    """Checks which malloc training and serving use.

    `preload` is LD_PRELOAD; `library` the installed tcmalloc; `refused` the libraries that ld.so cannot preload;
    `system` the contents of /etc/os-release.
    """
    values = {"preload": preload, "tcmalloc": library}
    if refused:
        text = f"LD_PRELOAD names what cannot be loaded, so that every program complains: {', '.join(refused)}"
        return Finding(_GROUP, "allocator", "problem", text, "unset LD_PRELOAD", values)
    if preload is None and library:
        text = f"tcmalloc ({library}), which training and engine vllm start with"
        return Finding(_GROUP, "allocator", "ok", text, values=values)
    if preload and "tcmalloc" in preload:
        return Finding(_GROUP, "allocator", "ok", f"tcmalloc, by LD_PRELOAD ({preload})", values=values)
    if library:
        what = f"is {preload}" if preload else "is set to nothing"
        text = f"LD_PRELOAD {what}, so that tcmalloc ({library}) is not used: training takes more memory and time"
        return Finding(_GROUP, "allocator", "note", text, "unset LD_PRELOAD", values)
    text = "tcmalloc is not installed: training takes more memory and time with glibc's malloc"
    return Finding(_GROUP, "allocator", "note", text, _install_tcmalloc(system), values)


def _install_tcmalloc(system: Mapping[str, str]) -> str:
    kinds = {system.get("ID", ""), *system.get("ID_LIKE", "").split()}
    if kinds & {"rhel", "fedora", "centos"}:
        return "dnf install epel-release && dnf install gperftools-libs"
    since = {"ubuntu": 24.04, "debian": 13.0}.get(system.get("ID", ""))  # renamed for the transition to 64-bit time
    renamed = since is not None and float(system.get("VERSION_ID") or 0) >= since
    return f"apt-get install libgoogle-perftools4{'t64' if renamed else ''}"


def open_files(soft: int, hard: int) -> Finding:
    """Checks the limits of open files, of which Ray raises the soft one as far as permitted. -1 means unlimited."""
    most = math.inf if -1 in (soft, hard) else max(soft, min(hard, _ENOUGH_FILES))
    values = {"soft": soft, "hard": hard}
    if most < _FEW_FILES:
        text = f"at most {hard} open files (ulimit -Hn): Ray loses connections"
        fix = (
            f"echo '* - nofile {_ENOUGH_FILES}' > /etc/security/limits.d/llm-ray.conf and log in again; docker run "
            f"--ulimit nofile={_ENOUGH_FILES}"
        )
        return Finding(_GROUP, "open files", "problem", text, fix, values)
    return Finding(_GROUP, "open files", "ok", f"limit {'none' if most == math.inf else int(most)}", values=values)


def tasks(limit: int, allowed: int | None, is_root: bool) -> Finding:
    """Checks the limits of processes and threads. `limit` is the user's (RLIMIT_NPROC, -1 means unlimited), which does
    not apply to root; `allowed` is the control group's."""
    values = {"user": limit, "control_group": allowed}
    if not is_root and 0 <= limit < _FEW_TASKS:
        text = f"at most {limit} processes and threads of this user (ulimit -u): Ray starts hundreds"
        fix = "echo '* - nproc 65536' > /etc/security/limits.d/llm-ray.conf and log in again"
        return Finding(_GROUP, "processes", "problem", text, fix, values)
    if allowed is not None and allowed < _FEW_TASKS:
        text = f"at most {allowed} processes and threads in this control group: Ray starts hundreds"
        fix = "docker run --pids-limit -1; systemctl set-property UNIT TasksMax=infinity"
        return Finding(_GROUP, "processes", "problem", text, fix, values)
    least = min([*([] if is_root or limit < 0 else [limit]), *([] if allowed is None else [allowed])], default=None)
    return Finding(_GROUP, "processes", "ok", f"limit {least or 'none'}", values=values)


def swap(sizes: Mapping[str, int]) -> Finding:
    """Checks swap usage. `sizes` are from /proc/meminfo, in bytes."""
    total = sizes.get("SwapTotal", 0)
    used = total - sizes.get("SwapFree", 0)
    values = {"total": total, "used": used}
    if used > sizes["MemTotal"] / 20:
        text = f"{gib(used)} are swapped out: what computes from there is a hundred times slower"
        fix = "end what takes the memory, then: swapoff -a && swapon -a"
        return Finding(_GROUP, "swap", "note", text, fix, values)
    return Finding(_GROUP, "swap", "ok", f"{gib(used)} of {gib(total)} used" if total else "none", values=values)


def huge_pages(text: str) -> Finding | None:
    """Checks transparent huge pages, given /sys/kernel/mm/transparent_hugepage/enabled; None if the kernel lacks
    them."""
    chosen = text.partition("[")[2].partition("]")[0]
    if not chosen:
        return None
    if chosen == "never":
        what = "switched off: large matrices take more time for addresses"
        fix = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root; at boot: transparent_hugepage=madvise)"
        return Finding(_GROUP, "huge pages", "note", what, fix, {"enabled": chosen})
    return Finding(_GROUP, "huge pages", "ok", chosen, values={"enabled": chosen})


def clock(synchronised: bool | None) -> Finding:
    """Checks whether the clock is synchronised; None means unknown."""
    values = {"synchronised": synchronised}
    if synchronised:
        return Finding(_GROUP, "clock", "ok", "synchronised", values=values)
    text = "not synchronised" if synchronised is False else "whether it is synchronised may not be asked here"
    fix = "timedatectl set-ntp true (or chronyd); in a container, on its host. A cluster's hosts may differ by 5 s"
    return Finding(_GROUP, "clock", "note", text, fix, values)
