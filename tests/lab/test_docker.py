"""The runtime docker: the image is built once and spread, nodes run in it as they do without it; Docker itself comes
beside what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.lab import cluster as lab_cluster
from tests.lab import docker
from tests.lab.cluster import Cluster
from tests.lab.conftest import Made
from tests.lab.hosts import Host
from tests.waiting import until

pytestmark = [pytest.mark.lab, pytest.mark.long]

_ENGINE = "- {hosts: ray_head, become: true, roles: [docker_engine]}\n"
_UNDO = """\
- hosts: ray_head
  become: true
  tasks: [{ansible.builtin.include_role: {name: docker_engine, tasks_from: remove}}]
"""


@pytest.fixture(scope="module")
def cluster(in_docker: Made) -> Cluster:
    """The hosts after site.yml. A test that breaks the cluster leaves it whole again."""
    return in_docker.cluster


@pytest.fixture(scope="module")
def engine(lab_ready: None) -> Iterator[Cluster]:
    """One bare host, and a playbook with nothing but docker_engine, which needs host_base's lists of packages."""
    with lab_cluster.cluster({"ray_head": ["solo"], "ray_workers": []}) as cluster:
        docker.prepare(cluster.head)
        (cluster.bundle / "engine.yml").write_text(_ENGINE)
        (cluster.bundle / "undo.yml").write_text(_UNDO)
        yield cluster
    docker.clear_cgroups()


def _unit(cluster: Cluster, host: Host) -> str:
    return "llm-ray-head" if host is cluster.head else "llm-ray-worker"


def _container(cluster: Cluster, host: Host) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(host.ssh(f"docker inspect {_unit(cluster, host)}").stdout)
    return found[0]


def _image(host: Host) -> dict[str, Any]:
    tags = host.ssh("docker image ls --format '{{.Repository}}:{{.Tag}}' llm-ray").stdout.split()
    assert len(tags) == 1, tags
    found: list[dict[str, Any]] = json.loads(host.ssh(f"docker inspect {tags[0]}").stdout)
    return found[0]


def _wait_until_healthy(cluster: Cluster, host: Host) -> None:
    until(lambda: _container(cluster, host)["State"]["Health"]["Status"] == "healthy", f"{host.name} is healthy")


def _status(asker: Host, url: str) -> str:
    code = (
        "import sys, urllib.error, urllib.request\n"
        f"try: print(urllib.request.urlopen('{url}', timeout=10).status)\nexcept urllib.error.HTTPError as error: "
        "print(error.code)"
    )
    return asker.ssh(f"python3 - <<'END'\n{code}\nEND").stdout.strip()


def test_every_host_is_a_node_and_closed_without_the_token(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    assert _status(cluster.head, "http://127.0.0.1:8265/api/jobs/") == "401"
    for host in cluster.nodes:
        assert _status(cluster.workers[0], f"http://{host.address}:52365/api/job_agent/jobs/") == "401"
        assert host.ssh("pgrep -c raylet").stdout.strip() == "1"


def test_the_image_is_built_once_and_the_same_everywhere(in_docker: Made) -> None:
    images = [_image(host) for host in in_docker.cluster.nodes]
    assert len({json.dumps(image["RootFS"]["Layers"]) for image in images}) == 1
    tasks = in_docker.site.output.split("TASK [")
    builders = [
        line
        for task in tasks
        if task.startswith("ray_node : Run docker build]")
        for line in task.splitlines()
        if line.startswith("changed")
    ]
    assert len(builders) == 1, builders
    assert builders[0].startswith("changed: [head")
    labels = images[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"] == docker.BASE
    assert labels["org.opencontainers.image.version"]
    assert images[0]["Config"]["User"] == "1200:1200"


def test_the_image_lists_what_is_in_it_and_needs_no_network(cluster: Cluster) -> None:
    tag = _image(cluster.head)["RepoTags"][0]
    listed = json.loads(
        cluster.head.ssh(f"docker run --rm --network none {tag} cat /opt/llm-ray/packages.cdx.json").stdout
    )
    versions = {part["purl"].partition("?")[0].rpartition("@")[0]: part["version"] for part in listed["components"]}
    assert versions["pkg:pypi/ray"] == "2.60.0"
    assert {"pkg:pypi/torch", "pkg:pypi/llm-ray", "pkg:deb/debian/libc6"} <= versions.keys()
    run = f"docker run --rm --network none --read-only --tmpfs /tmp --cap-drop ALL {tag}"
    said = cluster.head.ssh(
        f"{run} python -c 'import os, ray, torch, vllm; print(os.getuid(), torch.version.cuda)'", timeout=300
    ).stdout
    assert said.split()[-2:] == ["1200", "None"]


def test_nodes_have_no_power_over_their_host_and_are_well(cluster: Cluster) -> None:
    for host in cluster.nodes:
        config = _container(cluster, host)["HostConfig"]
        assert config["ReadonlyRootfs"]
        assert config["CapDrop"] == ["ALL"]
        assert "no-new-privileges" in config["SecurityOpt"]
        status = host.ssh("cat /proc/$(pgrep -o raylet)/status").stdout
        found = dict(
            line.split(":\t", 1) for line in status.splitlines() if line.startswith(("Uid", "CapEff", "NoNewPrivs"))
        )
        assert found["Uid"].split()[0] == host.ssh("id -u ray").stdout.strip()
        assert int(found["CapEff"], 16) == 0
        assert found["NoNewPrivs"] == "1"
        assert "SCHED_BATCH" in host.ssh("chrt --pid $(pgrep -o raylet)").stdout
        _wait_until_healthy(cluster, host)


def test_the_commands_are_on_the_hosts_path(cluster: Cluster) -> None:
    assert "3 node" in cluster.head.ssh("ray status | grep -c ' 1 node_' | sed 's/$/ node/'").stdout
    assert cluster.head.ssh("llm-ray --version").stdout.startswith("llm-ray")
    assert (
        cluster.workers[0]
        .ssh("cd /srv/llm-ray/data && echo 'print(1 + 1)' > sum.py && /opt/llm-ray/current/bin/python sum.py")
        .stdout
        == "2\n"
    )


def test_a_second_run_changes_nothing(in_docker: Made) -> None:
    cluster, first = in_docker.cluster, in_docker.site
    before = {host.name: _container(cluster, host)["Id"] for host in cluster.nodes}
    second = cluster.play("site.yml")
    assert second.changes() == []
    assert second.changed == 0
    assert {host.name: _container(cluster, host)["Id"] for host in cluster.nodes} == before
    assert second.seconds < first.seconds / 4, f"{second.seconds:.0f} s after {first.seconds:.0f} s"


def test_nodes_outlive_a_restart_of_docker(cluster: Cluster) -> None:
    worker = cluster.workers[0]
    before = _container(cluster, worker)
    pid = worker.ssh("systemctl show --property=MainPID --value llm-ray-worker").stdout
    worker.ssh("systemctl restart docker")
    until(lambda: worker.ssh("docker version", check=False).returncode == 0, "Docker answers")
    assert _container(cluster, worker)["State"]["StartedAt"] == before["State"]["StartedAt"]
    assert worker.ssh("systemctl show --property=MainPID --value llm-ray-worker").stdout == pid
    cluster.wait_for_nodes(cluster.nodes)


def test_a_node_that_is_killed_comes_back(cluster: Cluster) -> None:
    worker = cluster.workers[1]
    before = _container(cluster, worker)["Id"]
    worker.ssh("docker kill llm-ray-worker")
    until(
        lambda: (
            worker.ssh("docker inspect --format '{{.Id}}' llm-ray-worker", check=False).stdout.strip()
            not in ("", before)
        ),
        "a new one runs",
    )
    cluster.wait_for_nodes(cluster.nodes)


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
task = ray.remote(work).options(max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
print(ray.get(task))
"""
    cluster.head.ssh(f"rm -f /srv/llm-ray/data/began; cat > /srv/llm-ray/data/drain.py <<'END'\n{code}\nEND")
    cluster.head.ssh(
        "nohup /opt/llm-ray/current/bin/python /srv/llm-ray/data/drain.py > /tmp/drain.out 2>&1 < /dev/null &"
    )
    until(lambda: worker.ssh("test -e /srv/llm-ray/data/began", check=False).returncode == 0, "the task begins")
    worker.ssh("systemctl stop llm-ray-worker")
    try:
        until(lambda: cluster.head.ssh("pgrep -f data/drain.py", check=False).returncode != 0, "the driver ends")
        assert cluster.head.ssh("cat /tmp/drain.out").stdout.splitlines()[-1:] == ["whole"]
        assert worker.ssh("systemctl show --property=Result --value llm-ray-worker").stdout.strip() == "success"
        assert worker.ssh("docker ps --all --quiet").stdout == ""
    finally:
        worker.ssh("systemctl start llm-ray-worker")
    cluster.wait_for_nodes(cluster.nodes)


def test_an_archive_that_was_tampered_with_is_not_loaded(cluster: Cluster) -> None:
    worker = cluster.workers[1]
    worker.ssh("systemctl stop llm-ray-worker; docker image rm $(docker image ls --quiet llm-ray)")
    archive = next((cluster.lab.folder / "storage/images").glob("*.tar.gz"))
    with archive.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    refused = cluster.play("site.yml", "--tags", "ray_node", ok=False)
    assert refused.code != 0
    assert f"worker2: /srv/llm-ray/images/{archive.name} is not what was built" in " ".join(refused.output.split())
    assert worker.ssh("docker image ls --quiet llm-ray").stdout == ""
    archive.unlink()
    again = cluster.play("site.yml", "--tags", "ray_node", timeout=3000)
    loaded = [change for change in again.changes() if change.startswith("ray_node : Load the image")]
    assert len(loaded) == 1, again.changes()
    assert "worker2" in loaded[0]
    cluster.wait_for_nodes(cluster.nodes)


def test_a_registry_brings_the_image_to_the_host_that_lacks_it(cluster: Cluster) -> None:
    head, worker = cluster.head, cluster.workers[1]
    registry = f"{head.address}:5000"
    head.ssh("apt-get install -y -qq --no-install-recommends docker-registry", timeout=300)
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": "/var/lib/docker/registry"}},
        "http": {"addr": ":5000"},
    }
    head.ssh(f"systemctl disable -q --now docker-registry; echo '{json.dumps(settings)}' > /root/registry.yml")
    head.ssh("systemd-run --unit=registry --quiet docker-registry serve /root/registry.yml")
    worker.ssh("systemctl stop llm-ray-worker; docker image rm $(docker image ls --quiet llm-ray)")
    next((cluster.lab.folder / "storage/images").glob("*.tar.gz")).unlink()
    config = {
        "log-driver": "json-file",
        "live-restore": True,
        "insecure-registries": [registry],
    }  # without TLS, in the lab alone
    run = cluster.play(
        "site.yml",
        *(
            "--tags",
            "docker_engine,ray_node",
            "-e",
            json.dumps({"ray_node_registry": registry, "docker_engine_config": config}),
        ),
        timeout=3000,
    )
    assert [change for change in run.changes() if change.startswith("ray_node : Pull the image")] == [
        "ray_node : Pull the image: [worker2]"
    ]
    assert list((cluster.lab.folder / "storage/images").glob("*.tar.gz")) == []
    assert _image(worker)["RootFS"]["Layers"] == _image(head)["RootFS"]["Layers"]
    cluster.wait_for_nodes(cluster.nodes)
    head.ssh("systemctl stop registry; rm -r /var/lib/docker/registry")
    cluster.play("site.yml", "--tags", "docker_engine", timeout=3000)


def test_the_other_runtime_takes_the_node_over_and_gives_it_back(cluster: Cluster) -> None:
    worker = cluster.workers[1]
    own = cluster.lab.folder / "inventory/host_vars" / f"{worker.name}.yml"
    own.parent.mkdir(exist_ok=True)
    own.write_text(yaml.safe_dump({"ray_node_runtime": "bare_metal"}))
    cluster.play("site.yml", "--limit", worker.name, timeout=3000)
    cluster.wait_for_nodes(cluster.nodes)
    assert worker.ssh("docker ps --all --quiet").stdout == ""
    assert worker.ssh("pgrep -c raylet").stdout.strip() == "1"
    assert worker.ssh(
        "readlink /proc/$(systemctl show --property=MainPID --value llm-ray-worker)/exe"
    ).stdout.startswith("/usr/bin/python3")
    own.unlink()
    cluster.play("site.yml", "--limit", worker.name)
    cluster.wait_for_nodes(cluster.nodes)
    assert worker.ssh("docker ps --format '{{.Names}}'").stdout.split() == ["llm-ray-worker"]
    assert worker.ssh("pgrep -c raylet").stdout.strip() == "1"


def test_settings_of_others_stay_and_are_not_overwritten(engine: Cluster) -> None:
    host = engine.head
    host.ssh(
        """mkdir -p /etc/docker; echo '{"bip": "172.30.0.1/16", "log-driver": "journald"}' > /etc/docker/daemon.json"""
    )
    refused = engine.play("engine.yml", ok=False)
    said = " ".join(refused.output.split())
    assert refused.code != 0
    assert (
        'solo: /etc/docker/daemon.json has other values than docker_engine_config: log-driver is "journald" and not '
        '"json-file"' in said
    )
    host.ssh("""echo '{"bip": "172.30.0.1/16"}' > /etc/docker/daemon.json""")
    engine.play("engine.yml")
    wanted = {
        "bip": "172.30.0.1/16",
        "log-driver": "json-file",
        "log-opts": {"max-size": "50m", "max-file": "3"},
        "live-restore": True,
    }
    assert json.loads(host.ssh("cat /etc/docker/daemon.json").stdout) == wanted
    assert host.ssh("docker info --format '{{.LoggingDriver}} {{.LiveRestoreEnabled}}'").stdout.split() == [
        "json-file",
        "true",
    ]
    assert engine.play("engine.yml").changes() == []
    changed = engine.play("engine.yml", "-e", json.dumps({"docker_engine_config": {"live-restore": True}}))
    assert changed.code == 0
    assert json.loads(host.ssh("cat /etc/docker/daemon.json").stdout) == {"bip": "172.30.0.1/16", "live-restore": True}


def test_another_docker_is_refused_and_left_alone(engine: Cluster) -> None:
    host = engine.head
    refused = engine.play("engine.yml", "-e", "docker_engine_provider=docker_ce", ok=False)
    said = " ".join(refused.output.split())
    assert refused.code != 0
    assert "solo: docker_engine_provider = docker_ce: the host has containerd, docker.io, runc" in said
    assert "docker_engine_provider: distribution" in said
    host.ssh("docker version")
    before = host.ssh("cat /etc/docker/daemon.json").stdout
    assert engine.play("engine.yml", "-e", "docker_engine_provider=present").changed == 0
    assert host.ssh("cat /etc/docker/daemon.json").stdout == before


def test_remove_takes_away_what_the_role_brought(engine: Cluster) -> None:
    host = engine.head
    engine.play("undo.yml")
    assert json.loads(host.ssh("cat /etc/docker/daemon.json").stdout) == {"bip": "172.30.0.1/16"}
    assert host.ssh("command -v dockerd", check=False).stdout == ""
    assert engine.play("undo.yml").changed == 0
    host.ssh("touch /usr/local/bin/dockerd; chmod +x /usr/local/bin/dockerd")
    refused = engine.play("engine.yml", ok=False)
    assert refused.code != 0
    assert "the host has /usr/local/bin/dockerd" in " ".join(refused.output.split())
