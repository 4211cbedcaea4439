"""Ray of `mode: local`: closed to the network and to strangers on this host, beside others, and gone afterwards."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llm_ray.cluster import Cluster, fit_workers, local_ray, ray_session
from llm_ray.conf.finetune import Runtime
from llm_ray.errors import ClusterError
from llm_ray.serve.deployments.local import running, state_file
from tests.waiting import until

STRANGER = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('in')"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_ray(2) as joined:
        yield joined


def listening() -> dict[str, set[str]]:
    """Addresses that this process' children, and theirs, listen on, by process name."""
    found: dict[str, set[str]] = {}
    for child in psutil.Process().children(recursive=True):
        for connection in child.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(child.name(), set()).add(connection.laddr.ip)
    return found


# Before the others, whose Ray lasts to the end of the file: a process has one.
def test_a_host_too_busy_for_ray_to_start_in_time_gets_further_chances(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    tries = []

    def slow(**options: object) -> object:
        tries.append(options)
        if len(tries) < 3:
            raise RuntimeError(
                "The current node timed out during startup. This could happen because some of the raylet failed to "
                "startup"
            )
        return init(**options)

    init = ray.init
    monkeypatch.setattr(ray, "init", slow)
    with local_ray(1) as cluster:
        assert cluster.cpus == 1
    assert len(tries) == 3
    assert [record.message.rpartition(" (")[2] for record in caplog.records] == ["2 of 3)", "3 of 3)"]


def test_what_serves_outlives_a_first_start_that_was_too_slow_and_not_its_own_raylet(tmp_path: Path) -> None:
    """The raylet of the first start is dead, and nobody has waited for it: not the one to look at."""
    dead = tmp_path / "raylet"
    shutil.copy("/bin/false", dead)
    code = (
        "import subprocess, sys, ray\nfrom llm_ray.serve.deployments.local import main\n"
        "init = ray.init\n"
        "def slow(**options):\n"
        "    ray.init, ray.left = init, subprocess.Popen([sys.argv[1]])\n"
        "    raise RuntimeError('The current node timed out during startup.')\n"
        "ray.init = slow\nmain()\n"
    )
    home = tmp_path / "home"
    state_file(home).parent.mkdir(parents=True)
    command, environment = [sys.executable, "-c", code, str(dead)], {**os.environ, "LLM_RAY_HOME": str(home)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: running(home) or process.poll() is not None)
            with pytest.raises(subprocess.TimeoutExpired):  # it looks at its raylet every second
                process.wait(3)
            (raylet,) = [
                child
                for child in psutil.Process(process.pid).children()
                if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE
            ]
            raylet.kill()
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "raylet of Ray ended unexpectedly" in told
    assert running(home) is None


def test_every_port_is_on_loopback(cluster: Cluster) -> None:
    import ray

    ray.get(ray.remote(lambda: None).remote())
    addresses = listening()
    assert {"raylet", "gcs_server"} <= addresses.keys()
    for name, held in addresses.items():
        for address in held:
            assert ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback, (name, address)


def test_workers_allocate_by_tcmalloc(cluster: Cluster) -> None:
    import ray

    @ray.remote
    def libraries() -> str:
        return Path("/proc/self/maps").read_text()

    assert "tcmalloc" in ray.get(libraries.remote()), "is libgoogle-perftools4 installed?"


def test_a_connection_within_another_is_the_same_one(cluster: Cluster) -> None:
    """Also where a malloc is preloaded: of what a connection puts into the environment, a further one depends on
    nothing."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom llm_ray.cluster import join_local\n"
        "with join_local(sys.argv[1], Path(sys.argv[2])) as outer, join_local(sys.argv[1], Path(sys.argv[2])) as inner:\n"
        "    print(outer == inner)\n"
    )
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", code, address, environment["RAY_AUTH_TOKEN_PATH"]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_errors_of_ray_are_logged_and_not_written_among_a_commands_output(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray._private.utils import publish_error_to_driver

    publish_error_to_driver("died", "a part of Ray has died", ray._private.worker.global_worker.gcs_client)
    written, began = "", time.monotonic()
    while "a part of Ray has died" not in caplog.text + written:
        written += capsys.readouterr().out
        assert time.monotonic() - began < 30
    assert written == ""


def test_without_the_token_nobody_joins(cluster: Cluster, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")} | {
        "HOME": str(tmp_path)
    }
    strangers = [
        subprocess.Popen(
            [sys.executable, "-c", STRANGER, address],
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for more in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    ]
    for stranger in strangers:
        output, _ = stranger.communicate(timeout=300)  # Ray goes on trying for 20 s
        assert stranger.returncode != 0
        assert "in\n" not in output


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"no Ray cluster at 127\.0\.0\.1:1 \(runtime\.address\): Connection refused"),
        ("ray://127.0.0.1:10001", r"runtime\.address is 'ray://.*host:port"),
        ("head", r"runtime\.address is 'head'.*host:port"),
    ],
)
def test_an_address_where_no_cluster_is_is_told_at_once(address: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message), ray_session(Runtime(mode="cluster", address=address)):
        pass


@pytest.mark.parametrize(
    ("nodes", "runtime", "cpus"),
    [
        ([8], Runtime(workers=2), 4),
        ([8], Runtime(workers=3), 2),
        ([8, 8], Runtime(workers=2, placement="spread"), 8),
        ([8, 4], Runtime(workers=2, placement="strict_spread"), 4),
        ([2], Runtime(workers=1, cpus_per_worker=1), 1),
        ([8, 4], Runtime(workers=3, min_workers=2, placement="strict_spread"), 4),
        ([2], Runtime(workers=3, min_workers=1, cpus_per_worker=1), 1),
        ([8, 4, 2], Runtime(workers=2, hosts=("b", "10.0.0.3"), placement="strict_spread"), 2),
    ],
)
def test_cpus_are_shared_among_the_workers(nodes: list[int], runtime: Runtime, cpus: int) -> None:
    assert fit_workers(runtime, _made(nodes)).cpus == cpus


def _made(nodes: list[int]) -> Cluster:
    """Nodes with these CPUs, on hosts a, b, c at 10.0.0.1, 10.0.0.2, 10.0.0.3."""
    cpus = dict(zip("abc", nodes, strict=False))
    return Cluster(cpus, sorted(cpus), {name: (name, f"10.0.0.{'abc'.index(name) + 1}") for name in cpus})


@pytest.mark.parametrize(
    ("nodes", "runtime", "message"),
    [
        ([2], Runtime(workers=3), r"runtime\.workers is 3 with 1 CPU\(s\) each, but Ray has 2 CPU\(s\).*room for 2"),
        ([4, 4], Runtime(workers=3, placement="strict_spread"), "strict_spread, but Ray has 2 node"),
        ([4, 4], Runtime(workers=1, cpus_per_worker=8), r"with 8 CPU\(s\) each.*room for 0"),
        (
            [4],
            Runtime(workers=3, min_workers=2, placement="strict_spread"),
            "min_workers is 2 and runtime.placement strict_spread",
        ),
        ([8, 4], Runtime(workers=2, hosts=("b",), cpus_per_worker=4), "room for 1"),
        (
            [8, 4],
            Runtime(workers=1, hosts=("b", "d", "10.0.0.9")),
            r"runtime\.hosts names d, 10\.0\.0\.9, but Ray has no such node; it has a, b",
        ),
    ],
)
def test_what_does_not_fit_is_refused(nodes: list[int], runtime: Runtime, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        fit_workers(runtime, _made(nodes))
