"""site.yml on three bare hosts: check mode, a first run, a second one, and what hosts and runs that fail do to it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

import pytest
import yaml

from tests.lab.cluster import Cluster, Run
from tests.lab.conftest import First
from tests.lab.hosts import Host
from tests.waiting import until

pytestmark = pytest.mark.lab

_ASK = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1])
if len(sys.argv) > 2:
    request.add_header("Authorization", "Bearer " + open(sys.argv[2]).read())
try:
    print(urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def _ask(host: Host, url: str, token: str = "") -> int:
    """The status that a host gets from a URL."""
    return int(host.ssh(f"python3 - {url} {token} <<'END'\n{_ASK}\nEND").stdout)


def _unit(cluster: Cluster, host: Host) -> str:
    return "llm-ray-head" if host is cluster.head else "llm-ray-worker"


def _pids(cluster: Cluster) -> dict[str, str]:
    return {
        host.name: host.ssh(f"systemctl show -p MainPID --value {_unit(cluster, host)}").stdout.strip()
        for host in cluster.nodes
    }


def _variables(cluster: Cluster, values: dict[str, object], hosts: Sequence[Host]) -> None:
    """Give these hosts variables of their own."""
    folder = cluster.lab.folder / "inventory/host_vars"
    folder.mkdir(exist_ok=True)
    for host in hosts:
        (folder / f"{host.name}.yml").write_text(yaml.safe_dump(values))


def _labels(cluster: Cluster) -> dict[str, str]:
    return {address: node["Labels"].get("rack", "") for address, node in cluster.alive().items()}


def _no_failure(run: Run) -> None:
    assert {name: stats for name, stats in run.hosts.items() if stats["failed"] or stats["unreachable"]} == {}


def test_check_mode_works_on_bare_hosts_and_leaves_them_bare(first: First) -> None:
    _no_failure(first.check)
    assert "+RAY_AUTH_MODE=token" in first.check.output  # --diff shows what would be written
    assert first.after_check == ""


def test_every_host_runs_a_task_of_ray(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    code = """
import json, ray, socket
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(log_to_driver=False, logging_level="error")
where = ray.remote(lambda: socket.gethostname())
print("RAN", json.dumps([ray.get(where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote())
                         for node in ray.nodes() if node["Alive"]]))
"""
    assert sorted(json.loads(cluster.ray(code).rpartition("RAN ")[2])) == sorted(host.name for host in cluster.nodes)


def test_a_login_shell_on_the_head_means_this_cluster(cluster: Cluster) -> None:
    said = cluster.head.ssh("bash -lc '/opt/llm-ray/current/bin/ray status'").stdout
    assert len(re.findall(r"^ 1 node_", said, re.M)) == 3, said


def test_without_the_token_every_door_is_closed(cluster: Cluster) -> None:
    doors = [(cluster.head, "http://127.0.0.1:8265/api/jobs/")]
    doors += [(cluster.workers[0], f"http://{host.address}:52365/api/job_agent/jobs/") for host in cluster.nodes]
    assert [_ask(host, url) for host, url in doors] == [401] * 4
    # an agent's door, open, has no GET
    assert [_ask(host, url, "/etc/llm-ray/token") for host, url in doors] == [200, 405, 405, 405]


def test_the_token_is_in_no_argument_no_log_and_no_other_file(cluster: Cluster, first: First) -> None:
    token = cluster.head.ssh("cat /etc/llm-ray/token").stdout
    assert len(token) == 64
    assert token not in first.check.output + first.site.output
    for host in cluster.nodes:
        assert host.ssh("stat -c '%a %U' /etc/llm-ray/token").stdout.strip() == "400 ray"
        places = "/etc /run /tmp /var/log /var/lib/llm-ray /root /proc/[0-9]*/cmdline /proc/[0-9]*/environ"
        found = host.ssh(
            f"journalctl --no-pager > /tmp/journal; grep -rslF -D skip -f /etc/llm-ray/token {places}", check=False
        ).stdout
        assert found.split() == ["/etc/llm-ray/token"]


def test_the_unit_is_hardened(cluster: Cluster) -> None:
    for host in cluster.nodes:
        said = host.ssh(f"systemd-analyze security --no-pager {_unit(cluster, host)}").stdout
        exposure = re.search(r"exposure level for \S+: ([\d.]+)", said)
        assert exposure, said
        assert float(exposure[1]) <= 2.0, said
        assert (
            host.ssh(f"ps -o user= -p $(systemctl show -p MainPID --value {_unit(cluster, host)})").stdout.strip()
            == "ray"
        )


def test_ray_itself_does_not_interrupt_what_computes(cluster: Cluster) -> None:
    for host in cluster.nodes:
        assert "SCHED_BATCH" in host.ssh("chrt --pid $(pgrep -o raylet)").stdout


def test_a_second_run_changes_nothing_and_is_fast(cluster: Cluster, first: First) -> None:
    before = _pids(cluster)
    second = cluster.play("site.yml")
    print(
        f"three hosts: first run {first.site.seconds:.0f} s, second {second.seconds:.0f} s, "
        f"1/{first.site.seconds / second.seconds:.1f}"
    )
    assert second.changes() == []
    assert second.changed == 0
    assert _pids(cluster) == before
    assert second.seconds < first.site.seconds / 4, f"{second.seconds:.0f} s after {first.site.seconds:.0f} s"


@pytest.mark.long
def test_a_run_that_is_cut_off_is_made_up_for_and_restarts_only_what_it_concerns(cluster: Cluster) -> None:
    """It dies when a worker's unit is written and not yet restarted: nothing is to be changed then, and yet the unit
    must restart."""
    before, worker = _pids(cluster), cluster.workers[0]
    _variables(cluster, {"ray_node_labels": {"rack": "a"}}, [worker])
    cluster.cut_off("site.yml", "--tags", "ray_node", at="ray_node : Configure the deletion of old logs")
    assert "rack=a" in worker.ssh("cat /etc/systemd/system/llm-ray-worker.service").stdout
    assert _pids(cluster) == before
    again = cluster.play("site.yml")
    after = _pids(cluster)
    assert {name for name, pid in after.items() if pid != before[name]} == {worker.name}, again.changes()
    cluster.wait_for_nodes(cluster.nodes)
    assert _labels(cluster)[worker.address] == "a"


@pytest.mark.long
def test_a_host_cut_off_in_mid_run_leaves_the_others_finished_and_a_run_heals_it(cluster: Cluster) -> None:
    lost, others = cluster.workers[1], [cluster.head, cluster.workers[0]]
    _variables(cluster, {"ray_node_labels": {"rack": "b"}}, cluster.workers)
    run = cluster.start(
        "site.yml", ANSIBLE_SSH_ARGS="-o ControlMaster=auto -o ServerAliveInterval=3 -o ServerAliveCountMax=3"
    )
    assert run.stdout
    output = ""
    for line in run.stdout:
        output += line
        if line.startswith("TASK [host_base : Install packages"):
            lost.cut()
    try:
        assert run.wait() != 0
        stats = cluster.parse(output)
        assert [stats[host.name]["failed"] + stats[host.name]["unreachable"] for host in others] == [0, 0], output[
            -4000:
        ]
        assert stats[lost.name]["unreachable"] == 1
        cluster.wait_for_nodes(others)
        assert _labels(cluster)[cluster.workers[0].address] == "b"
    finally:
        lost.plug()
    lost.wait()
    cluster.play("site.yml")
    cluster.wait_for_nodes(cluster.nodes)
    assert _labels(cluster)[lost.address] == "b"


@pytest.mark.long
def test_a_task_finishes_when_its_node_is_stopped(cluster: Cluster) -> None:
    worker = cluster.workers[0]
    code = f"""
import ray, time
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(log_to_driver=False, logging_level="error")
node = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == "{worker.address}")
def work():
    open("/srv/llm-ray/data/began", "w").close()
    time.sleep(6)
    return "whole"
print(ray.get(ray.remote(work).options(max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()))
"""
    cluster.head.ssh(f"cat > /tmp/drain.py <<'END'\n{code}\nEND")
    cluster.head.ssh(
        "rm -f /srv/llm-ray/data/began; bash -lc '/opt/llm-ray/current/bin/python /tmp/drain.py > /tmp/drain.out 2>&1 "
        "&'"
    )
    until(lambda: worker.ssh("test -e /srv/llm-ray/data/began", check=False).returncode == 0, "the task begins")
    worker.ssh("systemctl stop llm-ray-worker")
    try:
        until(lambda: cluster.head.ssh("pgrep -f /tmp/drain.py", check=False).returncode != 0, "the driver ends")
        assert cluster.head.ssh("cat /tmp/drain.out").stdout.splitlines()[-1:] == ["whole"]
        assert worker.ssh("systemctl show -p Result --value llm-ray-worker").stdout.strip() == "success"
        assert worker.ssh("pgrep -u ray", check=False).stdout == ""
    finally:
        worker.ssh("systemctl start llm-ray-worker")
    cluster.wait_for_nodes(cluster.nodes)


@pytest.mark.long
def test_a_head_that_is_killed_restarts_and_the_workers_come_back(cluster: Cluster) -> None:
    before = _pids(cluster)["head"]
    cluster.head.ssh("systemctl kill --signal=KILL llm-ray-head")
    until(lambda: _pids(cluster)["head"] not in (before, "0"), "the head restarts")
    cluster.wait_for_nodes(cluster.nodes)


@pytest.mark.long
@pytest.mark.parametrize(
    "kept", [{"ray_node_keep_state": True}, {"ray_node_redis": "127.0.0.1:6399"}], ids=["on its disk", "in Redis"]
)
def test_a_head_that_keeps_its_state_goes_on_where_it_was(cluster: Cluster, kept: dict[str, object]) -> None:
    if "ray_node_redis" in kept:
        cluster.head.ssh(
            "apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server", timeout=300
        )
        cluster.head.ssh(
            "systemctl disable --now redis-server; systemd-run --unit=state redis-server --port 6399 --bind 127.0.0.1 "
            "--save ''"
        )
    _variables(cluster, kept, [cluster.head])
    cluster.play("site.yml", "--tags", "ray_node")
    cluster.wait_for_nodes(cluster.nodes)
    begin = """
import ray
ray.init(namespace="kept", log_to_driver=False, logging_level="error")
class Counter:
    def __init__(self):
        self.n = 0
    def add(self):
        self.n += 1
        return self.n
counter = ray.remote(Counter).options(name="counter", lifetime="detached", num_cpus=1, label_selector={"ray.io/node-id": NODE}).remote()
print(ray.get(counter.add.remote()))
"""
    node = next(node["NodeID"] for address, node in cluster.alive().items() if address == cluster.workers[0].address)
    assert cluster.ray(begin.replace("NODE", repr(node))).split()[-1] == "1"
    worker = _pids(cluster)[cluster.workers[0].name]
    cluster.head.ssh("systemctl kill --signal=KILL llm-ray-head")
    again = "import ray\nray.init(namespace='kept', log_to_driver=False, logging_level='error')\nprint(ray.get(ray.get_actor('counter').add.remote()))"
    said = ""

    def answers() -> bool:
        nonlocal said
        try:
            said = cluster.ray(again)
        except RuntimeError as error:
            said = str(error)
        return said.split()[-1:] == ["2"]

    until(answers, "the actor answers, with what it had counted", 240)
    assert _pids(cluster)[cluster.workers[0].name] == worker  # it did not have to join anew
    _variables(cluster, {}, [cluster.head])
    cluster.play("site.yml", "--tags", "ray_node")
    cluster.wait_for_nodes(cluster.nodes)
    cluster.head.ssh("systemctl stop state", check=False)


@pytest.mark.long
def test_hosts_that_were_rebooted_come_back_closed(cluster: Cluster) -> None:
    for host in (cluster.head, cluster.workers[0]):
        host.reboot()
        host.ssh("nft list chain inet llm_ray input")
    cluster.wait_for_nodes(cluster.nodes)


def test_what_is_wrong_with_the_hosts_comes_in_one_list(cluster: Cluster) -> None:
    first, second = cluster.workers
    second.ssh("systemd-run --unit=squatter python3 -m http.server 7383")
    try:
        values = {"preflight_min_cores": 999, "ray_node_object_store_gib": 4000, "ray_node_metrics_export_port": 7383}
        run = cluster.play("preflight.yml", "-e", json.dumps(values), ok=False)
    finally:
        second.ssh("systemctl stop squatter")
    assert run.code == 2
    assert run.changed == 0
    assert re.search(r"all: cores = \d+: cores: at least 999 are needed", run.output)
    assert re.search(r"all: ray_node_object_store_gib = 4000.0: larger than /dev/shm", run.output)
    assert re.search(rf"{second.name}: ray_node_metrics_export_port = 7383: port 7383 is used by python3", run.output)
    assert f"{first.name}: ray_node_metrics_export_port" not in run.output
    assert run.output.count("FAILED") == 1 or run.output.count("fatal: ") == 1


def test_what_a_kernel_cannot_do_is_said_before_anything_is_changed(cluster: Cluster) -> None:
    """The head as NFS server too, of hosts that are containers."""
    groups, variables = cluster.groups | {"nfs_server": ["head"]}, cluster.variables | {"llm_ray_storage": "nfs"}
    run = dataclasses.replace(cluster, groups=groups, variables=variables).play("site.yml", ok=False)
    assert run.code == 2
    assert run.changed == 0
    assert 'head: llm_ray_storage = "nfs": the kernel of this host has no nfsd (a container?)' in run.output
    assert 'worker1, worker2: llm_ray_storage = "nfs": the kernel of this host has no nfs (a container?)' in run.output


@pytest.mark.long
def test_another_allocator_is_the_one_of_that_host_alone(cluster: Cluster) -> None:
    worker, other = cluster.workers
    before = _pids(cluster)
    _variables(cluster, {"host_base_allocator": "jemalloc"}, [worker])
    cluster.play("site.yml", "--tags", "host_base,ray_node")
    preloaded = (
        "tr '\\0' '\\n' < /proc/$(systemctl show -p MainPID --value llm-ray-worker)/environ | sed -n s/^LD_PRELOAD=//p"
    )
    assert worker.ssh(preloaded).stdout.strip() == "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
    assert other.ssh(preloaded).stdout.strip() == "/usr/lib/x86_64-linux-gnu/libtcmalloc.so.4"
    _variables(cluster, {}, [worker])
    cluster.play("site.yml", "--tags", "host_base,ray_node")
    assert {name for name, pid in _pids(cluster).items() if pid != before[name]} == {worker.name}
    cluster.wait_for_nodes(cluster.nodes)


@pytest.mark.long
def test_a_token_that_is_removed_is_replaced_everywhere(cluster: Cluster) -> None:
    before = cluster.head.ssh("cat /etc/llm-ray/token").stdout
    cluster.head.ssh("rm /etc/llm-ray/token")
    cluster.play("site.yml", "--tags", "ray_node")
    (after,) = {host.ssh("cat /etc/llm-ray/token").stdout for host in cluster.nodes}
    assert len(after) == 64
    assert after != before
    cluster.wait_for_nodes(cluster.nodes)


def test_wheels_that_are_not_whole_are_refused_and_what_runs_stays(cluster: Cluster) -> None:
    worker = cluster.workers[0]
    worker.ssh(
        "mkdir -p /root/bundle && cd /root/bundle && echo a > a.whl && sha256sum a.whl > SHA256SUMS && echo b > a.whl"
    )
    before = worker.ssh("readlink /opt/llm-ray/current; ls /opt/llm-ray/env").stdout
    # another interpreter, though by name alone, wants another environment
    values = {"llm_ray_wheel_source": "/root/bundle", "python_runtime_python": "/usr/bin/python3.11"}
    run = cluster.play(
        "site.yml", "--tags", "python_runtime", "--limit", worker.name, "-e", json.dumps(values), ok=False
    )
    assert run.code == 2
    assert f"{worker.name}: python_runtime_wheels = /root/bundle: a.whl: FAILED: fill it again" in " ".join(
        run.output.split()
    )
    assert worker.ssh("readlink /opt/llm-ray/current; ls /opt/llm-ray/env").stdout == before
