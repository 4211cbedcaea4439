"""Serving on this machine: a separate Ray in the background, started by one command and joined by others.

python -m llm_ray.serve.deployments.local    # started by `llm-ray serve deploy`; SIGTERM drains and stops it

Its address and token file are in `LLM_RAY_HOME/serve/local.json`, readable only by its owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from llm_ray.cluster import join_local, local_ray
from llm_ray.conf.section import home
from llm_ray.conf.serve import ServeRuntime
from llm_ray.errors import ServeError
from llm_ray.files import write_json
from llm_ray.progress import Reporter
from llm_ray.serve.gateway import proxy

_POLL = 0.05  # seconds
_ERROR = re.compile(r" [EFC] \d+ \d+\]")
"""Marks errors and fatal ones in the logs of Ray's C++ processes."""
_KEPT = 5  # lines of each log
_VITAL = ("gcs_server", "raylet")  # Ray's names for the kinds of processes without which it is of no use
_WATCH = 1.0
_ENDS_WITHIN = 120  # seconds after the last request


@dataclass(frozen=True)
class LocalRay:
    """The Ray that serves on this machine."""

    pid: int
    began: int
    """Start time of the process, as returned by `_began`: a pid alone may have been reused."""
    address: str
    token: str
    """Path of its token file."""
    session: str
    """Folder of its logs."""
    ending: bool = False
    """Whether it is finishing the requests in progress before it exits."""


def state_file(home: Path) -> Path:
    """Returns the path of the file that describes the serving local Ray."""
    return home / "serve" / "local.json"


def running(home: Path) -> LocalRay | None:
    """Returns the serving local Ray, or None."""
    try:
        found = LocalRay(**json.loads(state_file(home).read_text()))
        alive = _began(found.pid) == found.began
    except (OSError, ValueError, TypeError):
        return None
    return found if alive else None


def _began(pid: int) -> int:
    """Returns when a process started, in clock ticks since boot (proc(5), `starttime`), which unlike wall-clock time
    does not change when the clock is set. Raises OSError if there is no such process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])


def start(home: Path, reporter: Reporter, timeout: float = 120) -> LocalRay:
    """Starts the serving local Ray in the background unless it is running. Raises ServeError."""
    found = running(home)
    if found and found.ending:
        reporter.line("The previous deployment is stopping; waiting for its last answers.")
        end(found)
    elif found:
        return found
    reporter.line("Starting Ray on this machine, in the background.")
    state = state_file(home)
    state.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = state.with_name("local.log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_ray.serve.deployments.local"],
            env={**os.environ, "LLM_RAY_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        return _started(process, home, log, timeout)
    except BaseException:
        _stop(process.pid, 30)
        raise


def _started(process: subprocess.Popen[bytes], home: Path, log: Path, timeout: float) -> LocalRay:
    """Waits until the background process serves. Raises ServeError."""
    import ray.serve  # noqa: F401  # takes seconds: import it while waiting

    began = time.monotonic()
    while True:
        if (found := running(home)) and found.pid == process.pid:
            return found
        if process.poll() is not None:
            if found := running(home):  # another command started it first
                return found
            lines = log.read_text(errors="replace").strip().splitlines()
            raise ServeError(f"Ray did not start on this machine: {lines[-1] if lines else 'no reason given'} ({log})")
        if time.monotonic() - began > timeout:
            raise ServeError(f"Ray did not start on this machine within {timeout:.0f} s ({log})")
        time.sleep(_POLL)


def end(found: LocalRay) -> None:
    """Stops the serving local Ray once the requests in progress have finished."""
    _stop(found.pid)


def _stop(pid: int, timeout: float | None = None) -> None:
    """Sends SIGTERM, and SIGKILL after `timeout` seconds."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        try:
            process.wait(timeout)
        except psutil.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def connected(runtime: ServeRuntime, home: Path, reporter: Reporter, begin: bool = False) -> Iterator[None]:
    """Connects to the serving Ray: the cluster's, or this machine's of `home`, which is started if `begin` is set.

    Raises ServeError if nothing is served, ClusterError if the cluster cannot be joined.
    """
    if runtime.mode == "cluster":
        from llm_ray.cluster import join_cluster

        with join_cluster(runtime.address, proxy.ENVIRONMENT):
            yield
        return
    found = start(home, reporter) if begin else running(home)
    if found is None:
        raise ServeError(
            "nothing is served on this machine: llm-ray serve deploy --model … starts it (a cluster: --address auto)"
        )
    with join_local(found.address, Path(found.token)):
        yield


def main() -> None:
    """Runs Ray in the background process until SIGTERM."""
    import fcntl

    state = state_file(home())
    signal.signal(signal.SIGTERM, _interrupt)  # during the start, same as Ctrl-C
    with state.with_name("local.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another process serves already", file=sys.stderr)
            raise SystemExit(1) from None
        os.environ.update(proxy.ENVIRONMENT)
        try:
            with local_ray():
                _serve_until_stopped()
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            state.unlink(missing_ok=True)


def _serve_until_stopped() -> None:
    """Serves until SIGTERM and then drains, or raises ServeError if a vital process of Ray dies."""
    import ray

    ending = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: ending.set())
    node = ray._private.worker._global_node
    me = psutil.Process()
    here = LocalRay(
        me.pid, _began(me.pid), node.gcs_address, os.environ["RAY_AUTH_TOKEN_PATH"], node.get_session_dir_path()
    )
    _save(here)
    # Not by name among the children: a first start that was too slow may have left a dead raylet there.
    vital = [psutil.Process(part.process.pid) for kind in _VITAL for part in node.all_processes[kind]]
    while not ending.wait(_WATCH):
        if dead := [
            child.name() for child in vital if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        ]:
            raise ServeError(f"{' and '.join(dead)} of Ray ended unexpectedly{_last_words(Path(here.session))}")
    _save(replace(here, ending=True))
    from llm_ray.serve.deployments.deploy import drain

    drain()
    signal.alarm(_ENDS_WITHIN)  # kills this process if Ray's shutdown hangs


def _last_words(session: Path) -> str:
    """Returns what Ray's own processes last logged as errors, in lines of their own; their logs go with the session."""
    lines = [
        f"{log.name}: {line}"
        for log in sorted([*session.glob("logs/raylet.*"), *session.glob("logs/gcs_server.*")])
        for line in [line for line in log.read_text(errors="replace").splitlines() if _ERROR.search(line)][-_KEPT:]
    ]
    return "".join(f"\n{line}" for line in lines)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _save(local_ray: LocalRay) -> None:
    state = state_file(home())
    state.touch(mode=0o600)
    write_json(state, asdict(local_ray))


if __name__ == "__main__":
    main()
