"""Logs of a model's running and failed replicas, from all hosts of the cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from llm_ray.errors import ServeError
from llm_ray.serve import directory
from llm_ray.serve.directory import DEPLOYMENT, GATEWAY

_POLL = 1.0  # seconds


def read_logs(name: str, lines: int, follow: bool) -> Iterator[str]:
    """Yields the last `lines` lines of each replica's log, oldest replica first; then, with `follow`, new lines without
    end.

    Raises ServeError if no host has a log of that model, or once no host is left.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    app, deployment = (GATEWAY, GATEWAY) if name == "gateway" else (directory.app_name(name), DEPLOYMENT)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0)(_read)
    offsets: dict[str, int] = {}
    while True:
        found = {}
        for node in list(nodes):
            on_node = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            asked = on_node.remote(
                re.sub(r"[^\w.-]", "_", f"{app}_{deployment}"),
                {k: v for k, v in offsets.items() if k.startswith(node["NodeID"])},
                node["NodeID"],
            )
            try:
                texts = ray.get(asked)
            except RayTaskError:
                raise
            except RayError:  # the host or all of Ray is gone
                nodes.remove(node)
                continue
            found.update({key: (node["NodeManagerHostname"], *value) for key, value in texts.items()})
        if not nodes:
            raise ServeError(f"no more logs of {name}: its Ray has ended")
        if not found and not offsets:
            raise ServeError(f"{name} has no logs here: llm-ray serve status shows what is deployed")
        for key, (host, offset, text) in found.items():
            log_lines = text.splitlines()
            if key not in offsets:
                yield f"--- {key.rpartition('/')[2]} on {host}"
                log_lines = log_lines[-lines:]
            offsets[key] = offset
            yield from log_lines
        if not follow:
            return
        time.sleep(_POLL)


def _read(mark: str, offsets: dict[str, int], node: str) -> dict[str, tuple[int, str]]:
    """Runs on a host: returns each replica log file's length, and its text since `offsets`."""
    import ray

    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    files = sorted((folder / "serve").glob(f"replica_{mark}_*.log"), key=lambda f: f.stat().st_mtime)
    workers = {file: _workers(folder, file) for file in files}
    texts = {}
    for file in [f for serve_log in files for f in (serve_log, *workers[serve_log])]:
        key = f"{node}/{file.name}"
        data = file.read_bytes()
        if len(data) > offsets.get(key, 0) or key not in offsets:
            texts[key] = (len(data), data[offsets.get(key, 0) :].decode(errors="replace"))
    return texts


def _workers(folder: Path, serve_log: Path) -> list[Path]:
    """Returns the files of the replica process's standard streams, which engines write to."""
    text = serve_log.read_text(errors="replace")[:2000]
    pid = next((part for line in text.splitlines() for part in line.split() if part.startswith("pid=")), None)
    return sorted(folder.glob(f"worker-*-{pid.removeprefix('pid=')}.*")) if pid else []
