"""Checks that the cluster has the expected nodes, and that they run the same software and see the same files.

A finding has the keys check, host, result (passed or failed), found, and fix, the remedy.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from llm_ray.errors import ClusterError
from llm_ray.operations.state import nodes

Finding = dict[str, str]
_SECONDS = 60.0  # for a task to start and end
_STORAGE_SECONDS = 15.0  # for a file to become visible on another host
_SOFTWARE = ("ray", "torch", "transformers", "llm-ray")
_HEAL = "repair it with ansible-playbook site.yml; journalctl -u 'llm-ray-*' on the host says why"


def finding(check: str, host: str, found: str, fix: str = "") -> Finding:
    """Returns a failed finding if there is a fix, else a passed one."""
    return {"check": check, "host": host, "result": "failed" if fix else "passed", "found": found, "fix": fix}


def check(inventory: Mapping[str, str], shared: Path) -> list[Finding]:
    """Returns all findings about the hosts of the inventory (addresses by name); writes temporary files below
    `shared`."""
    alive = {node["address"]: node for node in nodes()}
    findings = node_findings(inventory, alive)
    present = {
        host: alive[address]["id"]
        for host, address in inventory.items()
        if address in alive and not alive[address]["draining"]
    }
    folder = shared / f".validate-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise ClusterError(
            f"{shared} on the head: {error.strerror}: is the shared storage mounted, and does it belong to Ray's user?"
        ) from error
    try:
        answers = _run({host: (node, (str(folder), host)) for host, node in present.items()}, _write)
        findings += [
            finding("task", host, "a task ran") if isinstance(answer, dict) else finding("task", host, answer, _HEAL)
            for host, answer in answers.items()
        ]
        results = {host: answer for host, answer in answers.items() if isinstance(answer, dict)}
        findings += version_findings({host: answer["versions"] for host, answer in results.items()})
        wrote = [host for host, answer in results.items() if not answer["error"]]
        reads = _run({host: (present[host], (str(folder), wrote)) for host in results}, _read)
        findings += storage_findings({host: answer["error"] for host, answer in results.items()}, reads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return findings


def node_findings(inventory: Mapping[str, str], alive: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Compares the live nodes (by address) with the inventory (addresses by name)."""
    findings = []
    for host, address in inventory.items():
        node = alive.get(address)
        if node is None:
            findings.append(finding("node", host, f"not in the cluster ({address or 'its address is unknown'})", _HEAL))
        elif node["draining"]:
            findings.append(
                finding(
                    "node",
                    host,
                    "draining: it accepts no more work",
                    "restart its unit (systemctl restart 'llm-ray-*')",
                )
            )
        else:
            findings.append(finding("node", host, f"alive, {node['cpus']:g} CPUs, {node['memory_gib']} GiB"))
    for address, node in alive.items():
        if address not in inventory.values():
            fix = (
                "add it to ray_workers, or stop Ray there (a host that has left keeps the token: see "
                "docs/how-to/cluster/remove-node.md)"
            )
            findings.append(finding("node", node["host"], f"{address} is in the cluster but not in the inventory", fix))
    return findings


def version_findings(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Compares every host's software with that of the first host, the head."""
    findings: list[Finding] = []
    for host, found in versions.items():
        first, wanted = next(iter(versions.items()))
        other = [
            f"{name} {found.get(name)} where {first} has {version}"
            for name, version in wanted.items()
            if found.get(name) != version
        ]
        summary = ", ".join(other) or ", ".join(f"{name} {version}" for name, version in found.items())
        findings.append(
            finding(
                "versions",
                host,
                summary,
                "run ansible-playbook upgrade.yml to bring all hosts to the same version" if other else "",
            )
        )
    return findings


def storage_findings(errors: Mapping[str, str], reads: Mapping[str, Any]) -> list[Finding]:
    """Judges the results of writing (an error or an empty value by host) and reading (hosts whose files were not seen,
    or an error, by host)."""
    findings = []
    for host, error in errors.items():
        unseen = reads.get(host)
        fix = (
            f"check that the same shared storage is mounted on {host} (findmnt); repair it with ansible-playbook "
            "site.yml"
        )
        if error:
            findings.append(finding("storage", host, f"cannot write: {error}", fix))
        elif isinstance(unseen, str):
            findings.append(finding("storage", host, f"cannot read: {unseen}", fix))
        elif unseen:
            findings.append(finding("storage", host, f"does not see files written on {', '.join(unseen)}", fix))
        else:
            findings.append(finding("storage", host, "written, and read on all hosts"))
    return findings


def _run(tasks: Mapping[str, tuple[str, tuple[Any, ...]]], function: Any) -> dict[str, Any]:
    """Returns the function's result from each host's node, or a message if it failed. The tasks need no free CPU, so a
    busy cluster still answers."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(function())
    running = {
        host: remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for host, (node, arguments) in tasks.items()
    }
    ray.wait(list(running.values()), num_returns=len(running), timeout=_SECONDS) if running else None
    answers: dict[str, Any] = {}
    for host, reference in running.items():
        try:
            answers[host] = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            answers[host] = f"no task ran within {_SECONDS:.0f} s"
            ray.cancel(reference, force=True)
        except Exception as error:  # any failure on the host
            answers[host] = f"a task failed: {str(error).strip().splitlines()[-1]}"
    return answers


# Nested functions are pickled by value, so hosts with another version of this package can run them.


def _write() -> Any:
    software = _SOFTWARE

    def write(folder: str, host: str) -> dict[str, Any]:
        import platform
        from importlib import metadata

        error = ""
        try:
            with open(f"{folder}/{host}", "w") as file:  # noqa: PTH123
                file.write(host)
                file.flush()
                os.fsync(file.fileno())
        except OSError as failed:
            error = failed.strerror or str(failed)
        versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in software}
        return {"versions": versions, "error": error}

    return write


def _read() -> Any:
    seconds = _STORAGE_SECONDS

    def read(folder: str, hosts: list[str]) -> list[str]:
        until = time.monotonic() + seconds
        unseen = list(hosts)
        while True:
            for host in list(unseen):
                try:
                    with open(f"{folder}/{host}") as file:  # noqa: PTH123
                        if file.read() == host:
                            unseen.remove(host)
                except OSError:
                    continue
            if not unseen or time.monotonic() > until:
                return unseen
            time.sleep(0.2)

    return read
