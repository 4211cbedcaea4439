"""Starts, joins and leaves Ray.

``with ray_session(conf.runtime) as cluster:`` connects to Ray: to an instance of its own on this machine (`mode:
local`: free ports, no dashboard, ports protected by the session's token, removed afterwards) or to the running cluster
(`mode: cluster`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from llm_ray import cores
from llm_ray.conf.finetune import Runtime
from llm_ray.errors import ClusterError, LlmRayError
from llm_ray.hardware import malloc_environment
from llm_ray.threads import Once

# Ray's object store is shared memory; the bundle passes data as files, so a small store suffices.
OBJECT_STORE_BYTES = 128 * 2**20
# As on desktops, the cluster is a single machine with all ports on loopback. (Ray ignores 127.0.0.1 as node address
# alone.)
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Ray Train's controller looks at its workers that often; the default of 2 s adds seconds to the end of every run.
TRAIN = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}

# A process has one Ray connection, configured by process-wide environment variables (token and others): threads that
# want the same Ray share it, threads that want another wait until it is closed.
_RAY: Once[None] = Once()

# Ray's message when its processes do not start within 30 s, or its agents not within 15 s (in raylet.err alone), as
# happens on a busy host.
_TOO_SLOW = "timed out during startup"
_STARTS = 3


@dataclass(frozen=True)
class Cluster:
    """Resources of the connected Ray: CPUs of each live node by node id, and the nodes' host names."""

    node_cpus: dict[str, int]
    hosts: list[str]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Host name and address of each node, by node id."""

    def of(self, hosts: Sequence[str]) -> Cluster:
        """Returns the part of the cluster on `hosts` (names or addresses), or all of it if `hosts` is empty. Raises
        ClusterError if a host is missing."""
        if not hosts:
            return self
        if missing := [host for host in hosts if not any(host in names for names in self.names.values())]:
            raise ClusterError(
                f"runtime.hosts names {', '.join(missing)}, but Ray has no such node; it has "
                f"{', '.join(self.hosts) or 'none'}: correct the name, or start the host"
            )
        return self.among(hosts)

    def among(self, hosts: Sequence[str]) -> Cluster:
        """Like `of`, but skips missing hosts."""
        kept = [node for node in self.node_cpus if not hosts or set(hosts) & {*self.names.get(node, ())}]
        return Cluster(
            {node: self.node_cpus[node] for node in kept},
            sorted(self.names[node][0] for node in kept) if hosts else self.hosts,
            {node: names for node, names in self.names.items() if node in kept},
        )

    @property
    def cpus(self) -> int:
        return sum(self.node_cpus.values())


@dataclass(frozen=True)
class Workers:
    """The workers of a finetune that fit into the cluster: their number and the CPUs of each."""

    cluster: Cluster
    number: int
    cpus: int


def host_cluster() -> Cluster:
    """Returns what `mode: local` would have on this host, without starting it."""
    return Cluster({"this host": os.cpu_count() or 1}, [socket.gethostname()])


@contextlib.contextmanager
def local_ray(num_cpus: int | None = None) -> Iterator[Cluster]:
    """Runs a Ray instance of this process on free loopback ports, protected by a token; on exit it is stopped and its
    files are removed.

    Raises ClusterError if Ray does not start.
    """
    with _RAY.use(object(), lambda: _local_ray(num_cpus)):
        yield describe()


@contextlib.contextmanager
def _local_ray(num_cpus: int | None) -> Iterator[None]:
    with (
        _session_folder() as folder,
        _ray_environment(_settings(_make_token(folder)) | malloc_environment()),
        _quiet_ray(),
    ):
        options: dict[str, Any] = {
            "num_cpus": num_cpus or os.cpu_count(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": str(folder / "r"),  # Ray makes it world-readable, so it lies in a private folder
        }
        try:
            for start in range(1, _STARTS + 1):
                try:
                    _init(address="local", **options)
                    break
                except ClusterError as error:
                    if _TOO_SLOW not in str(error) or start == _STARTS:
                        raise
                    logging.getLogger(__name__).warning(
                        "Ray did not start within 30 s on this busy machine: starting it again (%d of %d)",
                        start + 1,
                        _STARTS,
                    )
                    _shut_down()
                    _end_processes(folder)
            yield
        finally:
            try:
                _shut_down()
            finally:
                _end_processes(folder)


@contextlib.contextmanager
def ray_session(runtime: Runtime) -> Iterator[Cluster]:
    """Starts or joins Ray as `runtime` specifies. Raises ClusterError if it cannot be started or reached."""
    if runtime.mode == "local":
        with local_ray() as cluster:
            yield cluster
        return
    with join_cluster(runtime.address) as cluster:
        yield cluster


@contextlib.contextmanager
def join_cluster(address: str, environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Joins the running cluster at `address` (`auto`: the cluster of this host). Raises ClusterError.

    Processes started there also get `environment`.
    """
    settings = dict(TRAIN)
    if address != "auto":
        _check_address(address)
        if _is_on_loopback_alone(address):
            settings |= LOOPBACK
    with _joined(address, settings, runtime_env={"env_vars": dict(environment)} if environment else None) as cluster:
        yield cluster


@contextlib.contextmanager
def join_local(address: str, token: Path) -> Iterator[Cluster]:
    """Joins a Ray that another process of this user started with `local_ray`. Raises ClusterError."""
    with _joined(address, _settings(token)) as cluster:
        yield cluster


@contextlib.contextmanager
def _joined(address: str, settings: dict[str, str], **options: object) -> Iterator[Cluster]:
    key = json.dumps([address, settings, options], sort_keys=True)
    with _RAY.use(key, lambda: _connection(address, settings, options)):
        yield describe()


@contextlib.contextmanager
def _connection(address: str, settings: dict[str, str], options: dict[str, object]) -> Iterator[None]:
    with _ray_environment(settings), _quiet_ray():
        try:
            _init(address=address, **options)
            yield
        finally:
            _shut_down()


def _check_address(address: str) -> None:
    """Raises ClusterError if nothing listens at `address`; Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ClusterError(
            f"runtime.address is {address!r}: expected host:port of the head's GCS, such as 10.0.0.1:6379, or auto "
            "on a node of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster at {address} (runtime.address): {error.strerror or error}. Is the head running there, "
            "and is the port open to this host?"
        ) from error


def _is_on_loopback_alone(address: str) -> bool:
    """Returns whether the cluster listens on loopback only. Ray replaces a loopback address by this host's external
    one, and would retry for minutes."""
    from ray.util import get_node_ip_address

    host, _, port = address.rpartition(":")
    if host not in ("localhost", "127.0.0.1", "[::1]"):
        return False
    try:
        socket.create_connection((get_node_ip_address(), int(port)), timeout=10).close()
    except OSError:
        return True
    return False


def describe() -> Cluster:
    """Returns the current nodes of the connected Ray; lost hosts are not included."""
    import ray

    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    return Cluster(
        {n["NodeID"]: int(n["Resources"]["CPU"]) for n in nodes},
        sorted(n["NodeManagerHostname"] for n in nodes),
        {n["NodeID"]: (n["NodeManagerHostname"], n["NodeManagerAddress"]) for n in nodes},
    )


def node_selector(runtime: Runtime, cluster: Cluster) -> dict[str, str]:
    """Returns the label selector that keeps Ray's workers on the nodes of `runtime.hosts`; empty if all may be used."""
    return {"ray.io/node-id": f"in({','.join(cluster.among(runtime.hosts).node_cpus)})"} if runtime.hosts else {}


def room_for(runtime: Runtime, cluster: Cluster, cpus: int) -> int:
    """Returns how many workers with `cpus` CPUs each fit into the cluster, at most `runtime.workers`."""
    nodes = cluster.among(runtime.hosts).node_cpus.values()
    room = (
        sum(1 for node in nodes if node >= cpus)
        if runtime.placement == "strict_spread"
        else sum(node // cpus for node in nodes)
    )
    return min(room, runtime.workers)


def fit_workers(runtime: Runtime, cluster: Cluster) -> Workers:
    """Returns the workers that fit into the cluster. Raises ClusterError if there are too few; Ray itself would wait
    forever."""
    nodes = sorted(cluster.of(runtime.hosts).node_cpus.values(), reverse=True)
    workers, fewest = runtime.workers, runtime.min_workers or runtime.workers
    strict = runtime.placement == "strict_spread"
    if strict and fewest > len(nodes):
        raise ClusterError(
            f"{_wanted(runtime)} and runtime.placement strict_spread, but Ray has {len(nodes)} node(s): use fewer "
            "workers or another placement"
        )
    if strict:  # some hosts may be lost
        workers = min(workers, len(nodes))
    on_one_host = -(-workers // len(nodes))
    if runtime.cpus_per_worker != "auto":
        wanted = runtime.cpus_per_worker
    else:
        wanted = max(
            1,
            nodes[0] // on_one_host
            if runtime.placement == "pack"
            else min(nodes[: min(workers, len(nodes))]) // on_one_host,
        )
    if (room := room_for(runtime, cluster, wanted)) < fewest:
        raise ClusterError(
            f"{_wanted(runtime)} with {wanted} CPU(s) each, but Ray has {', '.join(map(str, nodes))} CPU(s) on its "
            f"{len(nodes)} node(s), room for {room}: lower runtime.{'min_' if runtime.min_workers else ''}workers or "
            "runtime.cpus_per_worker"
        )
    return Workers(cluster, room, wanted)


def results(tasks: Any) -> Any:
    """Returns the results of Ray tasks. An LlmRayError is raised without Ray's traceback."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(tasks)
    except RayTaskError as error:
        if isinstance(error.cause, LlmRayError):
            raise error.cause from None
        raise


def _wanted(runtime: Runtime) -> str:
    return (
        f"runtime.min_workers is {runtime.min_workers}"
        if runtime.min_workers
        else f"runtime.workers is {runtime.workers}"
    )


def _init(address: str, **options: object) -> None:
    import ray

    if ray.is_initialized():
        raise ClusterError("Ray is already started in this process")
    try:
        _connect(address, **options)
    except SystemExit as error:  # Ray's SIGTERM handler raises it
        raise KeyboardInterrupt from error


def _connect(address: str, **options: object) -> None:
    import ray

    try:
        with _our_sigterm(), cores.background():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="llm-ray", **options)
        ray._private.worker.print_to_stdstream = _log  # by default Ray writes errors to stdout
    except Exception as error:  # Ray raises many types: connection, authentication, memory, ports
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if address == "local":
            raise ClusterError(f"Ray did not start on this machine: {reason}") from error
        raise ClusterError(
            f"no Ray cluster at {address} (runtime.address): {reason}. Is it running there, and does this process have "
            "its token (RAY_AUTH_TOKEN_PATH)?"
        ) from error


def _shut_down() -> None:
    import ray

    with _our_sigterm():
        ray.shutdown()


@contextlib.contextmanager
def _our_sigterm() -> Iterator[None]:
    """Restores the SIGTERM handler afterwards: Ray's start installs its own and its shutdown the default one, which
    both skip our clean-up."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def _log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    for line in data["lines"]:
        logging.getLogger(__name__).warning("Ray: %s", line)


def clean_up() -> None:
    """Removes remains of killed local sessions: folders, and Ray's agents, which would keep writing into them for half
    a minute."""
    for lock in Path(_short_temp_dir()).glob("llm-ray-*/lock"):
        with contextlib.suppress(OSError), lock.open("ab") as file:  # locked, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end_orphans(lock.parent)
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    """Yields a folder for one session, locked while it lasts. Remains of killed sessions are removed first."""
    clean_up()
    hidden = Path(tempfile.mkdtemp(prefix=".llm-ray-", dir=_short_temp_dir()))  # mode 0700, since it holds the token
    folder = hidden.with_name(hidden.name.removeprefix("."))
    with (hidden / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        hidden.rename(folder)  # only now visible to other sessions
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _end_orphans(folder: Path) -> None:
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or another user's
            if any(file.path.startswith(f"{folder}/r/") for file in process.open_files()):
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=5)


def _make_token(folder: Path) -> Path:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def _settings(token: Path) -> dict[str, str]:
    """Environment of a local session: protected by its token, no usage statistics sent."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        **LOOPBACK,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default gives workers the lowest priority
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **TRAIN,
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process less: this machine's only node is not taken away
    }


def _end_processes(folder: Path) -> None:
    """Kills processes of the session in `folder` that Ray no longer tracks, after Ctrl-C during its start or
    shutdown."""
    left = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            if str(folder) in " ".join(process.cmdline()):
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=5)


def _short_temp_dir() -> str:
    # A socket path is limited to 107 characters, and Ray appends about 70.
    chosen = tempfile.gettempdir()
    return chosen if len(chosen) <= 16 else "/tmp"  # noqa: S108


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables during the block, for this process and the processes it starts."""
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _ray_environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Like `environment`, and makes Ray in this process reload its settings."""
    try:
        with environment(settings):
            _reload_ray_config()
            yield
    finally:
        _reload_ray_config()


def _reload_ray_config() -> None:
    # Ray reads its settings once per process, but a second session has another token.
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config

    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0"

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("ray", "ray.train", "ray.serve", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
