"""Filters of the playbooks: validate hosts and cached facts, interpret results, and format tables."""

from __future__ import annotations

import difflib
import ipaddress
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import Undefined

Finding = dict[str, str]


def operations_needed(
    groups: Mapping[str, Sequence[str]], taking_part: Sequence[str], needed: Sequence[str] = ()
) -> str:
    """Returns why the cluster cannot be managed: no head in the inventory, or --limit excludes the head or other
    `needed` hosts; empty if it can."""
    heads = [*groups.get("ray_head", [])]
    if len(heads) != 1:
        near = difflib.get_close_matches("ray_head", set(groups) - {"ray_head"}, 1, 0.8)
        meant = f": the group {near[0]} means nothing here: did you mean ray_head?" if near else ""
        return f"the group ray_head of the inventory must have exactly one host, and has {len(heads)}{meant}: preflight.yml checks the inventory"
    missing = [host for host in dict.fromkeys([*heads, *needed]) if host not in taking_part]
    return f"--limit leaves out {', '.join(missing)}: nothing was changed: run this without --limit" if missing else ""


def operations_node(name: Any, groups: Mapping[str, Sequence[str]], verb: str) -> str:
    """Returns why the host `name` cannot be added or removed (`verb`); empty if it can."""
    workers = [*groups.get("ray_workers", [])]
    wanted = (
        f"name one worker: -e node={workers[0] if workers else 'NAME'}; the workers are {', '.join(workers) or 'none'}"
    )
    if not name:
        return f"node is not given: {wanted}"
    if name in groups.get("ray_head", []):
        return f"node = {name}: the head is not {verb}: {'reset.yml takes a cluster away' if verb == 'removed' else 'site.yml makes it'}"
    if not isinstance(name, str) or name in groups or any(sign in name for sign in ",:*!&[] "):
        return f"node = {name}: one host alone is {verb}: {wanted}"
    if name not in workers:
        near = difflib.get_close_matches(name, workers, 1, 0.6)
        state = (
            f"did you mean {near[0]}?"
            if near
            else "put it there first"
            if verb == "added"
            else f"the workers are {', '.join(workers)}"
        )
        return f"node = {name}: not in the group ray_workers of the inventory: {state}"
    if verb == "removed" and name in groups.get("nfs_server", []):
        return f"node = {name}: it holds the shared storage: move nfs_server to another host first"
    return ""


def cluster_addresses(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str]) -> dict[str, str]:
    """Returns each host's address in the cluster: ray_node_address, else that of its facts, else ansible_host; empty if
    none is known."""
    found = {}
    for host in hosts:
        own = hostvars[host]
        chosen = own.get("ray_node_address")
        fact = ((own.get("ansible_facts") or {}).get("default_ipv4") or {}).get("address")
        # Undefined if the inventory computes it from missing facts.
        found[host] = str((None if isinstance(chosen, Undefined) else chosen) or fact or own.get("ansible_host") or "")
    return found


def operations_facts(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str]) -> dict[str, str]:
    """Returns for each host whether its cached facts are its own, those of another host (as in a cluster with the same
    host names), unsure (the inventory has no address to compare), or none."""
    found = {}
    for host in hosts:
        facts, address = hostvars[host].get("ansible_facts") or {}, str(hostvars[host].get("ansible_host") or host)
        if not facts.get("default_ipv4"):
            found[host] = "none"
        elif address in (*facts.get("all_ipv4_addresses", ()), *facts.get("all_ipv6_addresses", ())):
            found[host] = "own"
        else:
            found[host] = "other" if _is_address(address) else "unsure"
    return found


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def operations_units(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str]) -> list[dict[str, str]]:
    """Returns rows about the units of each host, from systemd's answers (__status_units)."""
    rows = []
    for host in hosts:
        asked = hostvars[host].get("__status_units")
        if asked is None:
            rows.append({"host": host, "state": "left out by --limit"})
            continue
        found = [one["status"] for one in asked.get("results", []) if one.get("status")]
        if not found:
            reached = any(not one.get("unreachable") for one in asked.get("results", []))
            rows.append(
                {
                    "host": host,
                    "state": "no units: site.yml has not made it a node" if reached else "the host is not reached",
                }
            )
        rows += [
            {
                "host": host,
                "unit": unit["Id"].removesuffix(".service"),
                "state": f"{unit['ActiveState']} ({unit['SubState']})",
                "boot": unit.get("UnitFileState", ""),
                "restarts": unit.get("NRestarts", ""),
                "since": unit.get("StateChangeTimestamp", ""),
            }
            for unit in found
        ]
    return rows


def operations_answer(run: Mapping[str, Any]) -> Any:
    """Returns the answer of llm_ray.operations, or {"error": reason}."""
    lines = [line for line in str(run.get("stdout", "")).splitlines() if line.strip()]
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        if run.get("rc") == 124:  # exit code of the command timeout
            return {"error": f"no answer within {run['cmd'][1]} s"}
        answer_lines = str(run.get("stderr") or run.get("msg") or "no answer").strip().splitlines()
        return {"error": answer_lines[-1] if answer_lines else "no answer"}


def operations_failed(result: Mapping[str, Any], check: str, host: str) -> list[Finding]:
    """Returns findings for a role's failed check. Its message has the form HOST: problem: remedy."""
    failed = [one for one in result.get("results", []) if one.get("failed")] or [result]
    findings = []
    for one in failed:
        reason = str(one.get("stderr") or one.get("msg") or "failed").strip().splitlines()[-1].removeprefix(f"{host}: ")
        found, _, fix = reason.rpartition(": ") if one.get("assertion") else (reason, "", "")
        fix = fix if found and fix else f"repair it with ansible-playbook site.yml --limit {host}"
        findings.append({"check": check, "host": host, "result": "failed", "found": found or reason, "fix": fix})
    return findings


def operations_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Formats rows as a table with column names. The last column is not padded."""
    shown = [[*columns], *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(row[at]) for row in shown) for at in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )


def operations_list(findings: Sequence[Finding]) -> str:
    """Formats failed findings as lines of the form host: check: problem: remedy."""
    return "\n".join(f"{one['host']}: {one['check']}: {one['found']}: {one['fix']}" for one in findings)


def workflow_figures(result: Mapping[str, Any], name: str, folder: str, stages: Sequence[str]) -> str:
    """Formats the result of a finetune: its folder, its figures, and the command to serve it."""
    lines = [f"{name} is done: {folder}"]
    training, evaluation = result.get("training") or {}, result.get("evaluation") or {}
    if "loss" in training:
        lines.append(
            f"loss {training['loss']:.4f}, {training.get('tokens', 0):,} tokens, "
            f"{training.get('tokens_per_second', 0):.0f} tokens/s"
        )
    for key, value in (evaluation.get("finetuned") or {}).items():
        if isinstance(value, (int, float)):
            before = (evaluation.get("base") or {}).get(key)
            lines.append(
                f"{key.replace('_', ' ')}: {before:.3f} before, {value:.3f} after"
                if before is not None
                else f"{key}: {value:.3f}"
            )
    for row in evaluation.get("tasks") or []:
        if row["base"] is not None:
            lines.append(f"{row['task']} {row['metric']}: {row['base']:.3f} before, {row['finetuned']:.3f} after")
    if "export" in stages:
        lines += [f"the model: {folder}/output", f"to serve it: ansible-playbook serve.yml -e model={name}"]
    return "\n".join(lines)


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "operations_needed": operations_needed,
            "operations_node": operations_node,
            "cluster_addresses": cluster_addresses,
            "operations_facts": operations_facts,
            "operations_units": operations_units,
            "operations_answer": operations_answer,
            "operations_failed": operations_failed,
            "operations_table": operations_table,
            "operations_list": operations_list,
            "workflow_figures": workflow_figures,
        }
