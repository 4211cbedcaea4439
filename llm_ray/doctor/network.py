"""Ports and proxies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

from llm_ray.doctor.finding import Finding

_GROUP = "Network"
ENDPOINT, PAGE = 8000, 7860  # defaults of endpoint.port and `llm-ray ui --port`
# Ports of a cluster's head. Local runs and deployments choose free ports.
HEAD = {"Ray's GCS": 6379, "Ray's dashboard": 8265, "Ray Client": 10001, "Ray's dashboard agent": 52365}
PORTS = {"endpoint": ENDPOINT, "page": PAGE, **HEAD}
_RAY = ("ray", "gcs_server")
_OTHER_PORT = {
    "endpoint": "llm-ray serve deploy … --port 8001",
    "page": "llm-ray ui --port 7861",
}


def ports(taken: Collection[Mapping[str, Any]], ours: Collection[int]) -> list[Finding]:
    """Reports the entries of PORTS in use, as returned by host.facts.taken, and the free ones in one line.

    `ours` are the ids of the processes with which llm-ray serves on this machine.
    """
    found = []
    for one in taken:
        name, port, by = one["name"], one["port"], one["by"] or "a process of another user"
        check, values = f"{name} (port {port})", {"port": port, "by": one["by"], "pid": one["pid"]}
        if one["pid"] in ours:
            found.append(Finding(_GROUP, check, "ok", f"held by llm-ray itself: {by}", values=values))
        elif one["by"].startswith(_RAY):
            found.append(Finding(_GROUP, check, *_of_ray(name, by), values))
        elif name in _OTHER_PORT:
            fix = f"{_OTHER_PORT[name]}, or end it: {_end(one)}"
            found.append(Finding(_GROUP, check, "problem", f"held by {by}", fix, values))
        else:
            text = f"held by {by}: in the way only if this host becomes a cluster's head"
            fix = f"before site.yml, end it: {_end(one)}"
            found.append(Finding(_GROUP, check, "note", text, fix, values))
    held = {one["name"] for one in taken}
    if free := [f"{name} {port}" for name, port in PORTS.items() if name not in held]:
        values = {"free": [port for name, port in PORTS.items() if name not in held]}
        found.append(Finding(_GROUP, "free ports", "ok", ", ".join(free), values=values))
    return found


def _of_ray(name: str, by: str) -> tuple[Any, str, str]:
    if name not in _OTHER_PORT:
        return "ok", f"held by a Ray: {by}", ""
    return (
        "note",
        f"held by a Ray that is not this user's local one: {by}",
        f"{_OTHER_PORT[name]}; or join it: --address auto",
    )


def _end(one: Mapping[str, Any]) -> str:
    return f"kill {one['pid']}" if one["pid"] else f"as root, fuser -k {one['port']}/tcp"


def proxies(environ: Mapping[str, str]) -> Finding:
    """Checks whether the environment would send requests to this machine through a proxy."""
    named = {
        name.lower().removesuffix("_proxy"): value
        for name, value in sorted(environ.items())  # lower case comes last and takes precedence, as in all clients
        if value and name.lower().endswith("_proxy")
    }
    used = sorted({"http", "https", "all"} & set(named))
    values = {"proxies": used, "no_proxy": named.get("no", "")}
    if not used:
        return Finding(_GROUP, "proxies", "ok", "none in the environment", values=values)
    caught = [host for host in ("127.0.0.1", "localhost") if not proxy_bypass_environment(host, named)]
    if caught:
        text = f"{', '.join(f'{name}_proxy' for name in used)} also applies to {' and '.join(caught)}: clients ask the proxy for the endpoint"
        own = "127.0.0.1,localhost,::1,$no_proxy"
        fix = f"export no_proxy={own} NO_PROXY={own}"
        return Finding(_GROUP, "proxies", "problem", text, fix, values)
    return Finding(_GROUP, "proxies", "ok", f"{', '.join(used)}, not for this machine", values=values)
