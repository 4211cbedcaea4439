"""The role monitoring on a head and a worker: what is read, what is closed, what a change restarts, and that it goes
without a trace."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.lab import cluster as lab_cluster
from tests.lab.cluster import Cluster
from tests.lab.hosts import Host
from tests.unit.ansible.test_monitoring import metrics

pytestmark = [pytest.mark.lab, pytest.mark.long]

RULES_TEST = Path(__file__).parent / "rules_test.yml"
UNITS = ("llm-ray-prometheus", "llm-ray-node-exporter", "llm-ray-head")
# Two objects fit into the lab's object store: the others go to disk.
SPILL = """
import numpy, ray
ray.init(log_to_driver=False, logging_level="error")
@ray.remote
class Keeper:
    def keep(self):
        self.kept = [ray.put(numpy.zeros(60 * 2**20, dtype=numpy.uint8)) for _ in range(6)]
        return len(self.kept)
keeper = Keeper.options(name="keeper", lifetime="detached", namespace="test").remote()
print(ray.get(keeper.keep.remote()))
"""


@pytest.fixture(scope="module")
def watched(lab_ready: None) -> Iterator[Cluster]:
    """Two hosts, monitored."""
    groups = {"ray_head": ["head"], "ray_workers": ["worker1"]}
    with lab_cluster.cluster(groups, monitoring_enabled=True, monitoring_interval=5) as made:
        made.play("site.yml", "--tags", "monitoring", "--check", "--diff")  # on bare hosts
        made.play("site.yml")
        yield made


def ask(cluster: Cluster, path: str) -> Any:
    """Ask Prometheus' HTTP API, on the head, where alone it listens."""
    code = f"import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9090/api/v1/{path}', timeout=10).read().decode())"
    return json.loads(cluster.head.ssh(f'python3 -c "{code}"').stdout)["data"]


def query(cluster: Cluster, expression: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(cluster, f"query?query={quote(expression)}")["result"]
    return found


def eventually(what: str, seconds: float, check: Any) -> None:
    """Until `check` gives nothing; fails with what it gave last."""
    end = time.monotonic() + seconds
    while found := check():
        if time.monotonic() > end:
            raise AssertionError(f"{what} after {seconds:.0f} s: {found}")
        time.sleep(1)


def pids(host: Host) -> dict[str, str]:
    return {unit: host.ssh(f"systemctl show --property=MainPID --value {unit}").stdout.strip() for unit in UNITS}


def listening(host: Host, port: int) -> list[str]:
    return [
        line.split()[3] for line in host.ssh("ss -ltnH").stdout.splitlines() if line.split()[3].endswith(f":{port}")
    ]


def test_every_node_and_host_is_read(watched: Cluster) -> None:
    wanted = {(job, host) for job in ("ray", "node") for host in ("head", "worker1")}

    def unread() -> set[tuple[str, str]]:
        return wanted - {(one["metric"]["job"], one["metric"].get("host", "")) for one in query(watched, "up == 1")}

    eventually("not read", 90, unread)


def test_ray_and_the_hosts_export_what_rules_and_dashboards_ask(watched: Cluster) -> None:
    watched.ray(SPILL)
    asked = metrics("ray_") | metrics("node_")
    assert {"ray_tasks", "node_cpu_seconds_total"} <= asked

    def missing() -> set[str]:
        return asked - set(ask(watched, "label/__name__/values"))

    eventually("not exported", 90, missing)
    eventually(
        "no objects on disk", 60, lambda: not query(watched, 'ray_spill_manager_request_total{Type="Spilled"} > 0')
    )
    watched.ray('import ray; ray.init(log_to_driver=False, namespace="test"); ray.kill(ray.get_actor("keeper"))')


def test_the_rules_do_what_they_say(watched: Cluster) -> None:
    head = watched.head
    test = RULES_TEST.read_text().replace(
        "../../roles/monitoring/files/rules.yml", "/etc/llm-ray/prometheus/rules/llm-ray.yml"
    )
    head.ssh(f"cat > /tmp/rules_test.yml <<'END'\n{test}\nEND\n")
    assert "SUCCESS" in head.ssh("promtool test rules /tmp/rules_test.yml").stdout
    assert "SUCCESS" in head.ssh("promtool check config /etc/llm-ray/prometheus/prometheus.yml").stdout
    loaded = {rule["name"] for group in ask(watched, "rules")["groups"] for rule in group["rules"]}
    assert "RayNodeDown" in loaded
    head.ssh("sed -i 's/< 0.10/< 0.01/' /etc/llm-ray/prometheus/rules/llm-ray.yml")
    assert head.ssh("promtool test rules /tmp/rules_test.yml", check=False).returncode != 0, (
        "the tests of the rules find no wrong rule"
    )
    watched.play("site.yml", "--tags", "monitoring")


def test_others_reach_neither(watched: Cluster) -> None:
    for host in watched.nodes:
        assert listening(host, 9100) == [f"{host.address}:9100"]
        assert "9100" in host.ssh("nft list set inet llm_ray cluster_only").stdout
        assert (
            host.ssh("systemctl is-active prometheus-node-exporter prometheus", check=False).stdout.split()
            == ["inactive"] * 2
        )
    assert listening(watched.head, 9090) == ["127.0.0.1:9090"]
    assert listening(watched.workers[0], 9090) == []


def test_the_key_opens_metrics_alone_and_is_seen_by_prometheus_alone(watched: Cluster) -> None:
    path = "/etc/llm-ray/prometheus/serve-key"
    assert watched.head.ssh(f"stat -c '%U %a' {path}").stdout.split() == ["llm-ray-monitoring", "400"]
    (key,) = json.loads(watched.head.ssh("cat /srv/llm-ray/serve/keys.json").stdout).values()
    assert (key["name"], key["models"]) == ("llm-ray-monitoring", ["-"])
    assert watched.head.ssh(f"cat {path}").stdout.startswith(f"llmray-{key['id']}-")


def test_a_second_run_changes_nothing(watched: Cluster) -> None:
    second = watched.play("site.yml", "--tags", "monitoring")
    assert second.changes() == []


def test_a_change_restarts_what_it_concerns(watched: Cluster) -> None:
    before = pids(watched.head)
    watched.play("site.yml", "--tags", "monitoring", "-e", "monitoring_retention=10d")
    after = pids(watched.head)
    assert {unit for unit in UNITS if before[unit] != after[unit]} == {"llm-ray-prometheus"}
    watched.play("site.yml", "--tags", "monitoring", "-e", "monitoring_retention=10d", "-e", "monitoring_interval=7")
    assert pids(watched.head) == after  # reloaded
    assert "scrape_interval: 7s" in ask(watched, "status/config")["yaml"]


def test_validate_names_a_host_that_is_not_read(watched: Cluster) -> None:
    play = [
        {
            "hosts": "ray_head",
            "become": True,
            "tasks": [{"ansible.builtin.include_role": {"name": "monitoring", "tasks_from": "validate"}}],
        }
    ]
    (watched.bundle / "monitoring_validate.yml").write_text(json.dumps(play))
    watched.play("monitoring_validate.yml")
    worker = watched.workers[0]
    worker.ssh("systemctl stop llm-ray-node-exporter")
    eventually("still read", 60, lambda: query(watched, 'up{job="node", host="worker1"} == 1'))
    failed = watched.play("monitoring_validate.yml", "--check", ok=False)
    assert "Prometheus does not scrape node of worker1" in failed.output
    worker.ssh("systemctl start llm-ray-node-exporter")


def test_it_goes_without_a_trace_and_comes_from_archives(watched: Cluster) -> None:
    head = watched.head
    # The project's archives, as a mirror has them; the programs in them are the packages'.
    for name, version, programs in [
        ("prometheus", "2.53.4", {"prometheus": "prometheus", "promtool": "promtool"}),
        ("node_exporter", "1.8.2", {"prometheus-node-exporter": "node_exporter"}),
    ]:
        folder, made = f"/srv/mirror/{name}/releases/download/v{version}", f"{name}-{version}.linux-amd64"
        head.ssh(f"mkdir -p {folder}/{made} && touch {folder}/{made}/LICENSE")
        head.ssh(" && ".join(f"cp /usr/bin/{here} {folder}/{made}/{there}" for here, there in programs.items()))
        head.ssh(
            f"cd {folder} && tar czf {made}.tar.gz {made} && rm -r {made} && sha256sum {made}.tar.gz > sha256sums.txt"
        )
    head.ssh("systemd-run --unit=mirror --working-directory=/srv/mirror python3 -m http.server 9999")

    before = pids(head)["llm-ray-head"]
    # A file of the same name that another role has for another package's service.
    head.ssh("mkdir -p /etc/systemd/system/rpcbind.service.d; touch /etc/systemd/system/rpcbind.service.d/llm-ray.conf")
    watched.play("site.yml", "--tags", "monitoring", "-e", "monitoring_enabled=false")
    head.ssh("ls /etc/systemd/system/rpcbind.service.d/llm-ray.conf; rm -r /etc/systemd/system/rpcbind.service.d")
    for host in watched.nodes:
        left = host.ssh(
            "ls -d /etc/llm-ray/prometheus /var/lib/llm-ray-prometheus /opt/llm-ray/monitoring "
            "/etc/systemd/system/llm-ray-prometheus.service /etc/systemd/system/llm-ray-node-exporter.service "
            "/usr/bin/prometheus /usr/bin/prometheus-node-exporter 2>/dev/null; find /etc/systemd/system -path "
            "'*prometheus*'; id -un llm-ray-monitoring 2>/dev/null",
            check=False,
        )  # fmt: skip
        assert left.stdout == ""
        assert listening(host, 9090) + listening(host, 9100) == []
    assert watched.play("site.yml", "--tags", "monitoring", "-e", "monitoring_enabled=false").changes() == []
    assert pids(head)["llm-ray-head"] == before

    archives = ["-e", "monitoring_provider=archive", "-e", f"monitoring_mirror=http://{head.address}:9999"]
    watched.play("site.yml", "--tags", "monitoring", *archives)
    test_every_node_and_host_is_read(watched)
    assert (
        head.ssh("systemctl show --property=ExecStart llm-ray-prometheus").stdout.count(
            "/opt/llm-ray/monitoring/prometheus-2.53.4"
        )
        > 0
    )
    assert watched.play("site.yml", "--tags", "monitoring", *archives).changes() == []
