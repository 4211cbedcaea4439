"""The runtime docker without the internet: the machine that runs bundle.yml builds the image, and site.yml brings it to
a host that cannot.

Docker "of the control machine" is one that runs in a host beside the cluster, so that this machine needs none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from tests.lab import cluster as lab_cluster
from tests.lab import docker, offline
from tests.lab.cluster import Cluster
from tests.lab.hosts import Container, Host
from tests.waiting import until

pytestmark = [pytest.mark.lab, pytest.mark.long]


class Offline(Container):
    """A host with the listed packages, of which site.yml can install no other."""

    packages: ClassVar[tuple[str, ...]] = offline.packages(runtime="docker", storage="existing", hosts=1)


@dataclass(frozen=True)
class Bundled:
    cluster: Cluster
    builder: Cluster
    folder: Path
    docker: dict[str, str]
    """Environment in which a command of this machine finds the builder's Docker."""


@pytest.fixture(scope="module")
def bundled(lab_ready: None) -> Iterator[Bundled]:
    """A host in docker, a bundle with an image for it, and no way out."""
    folder = offline.folder("bundle-image")
    variables = docker.VARIABLES | {"llm_ray_wheel_source": "", "llm_ray_offline_bundle": str(folder)}
    with lab_cluster.cluster({"ray_head": ["head"], "ray_workers": []}, kind=Offline, **variables) as made:
        made.lab.add("builder", kind=Offline, shares={made.lab.folder / "storage": "/srv/llm-ray"})
        for host in made.hosts.values():
            docker.prepare(host)
        offline.cut(made)
        builder = Cluster(made.lab, made.bundle, {"ray_head": ["builder"], "ray_workers": []}, made.variables)
        docker.import_base(builder)
        socket, commands = made.lab.folder / "docker.sock", made.lab.folder / "bin"
        commands.mkdir()
        shutil.copy(made.hosts["builder"].root / "usr/bin/docker", commands)
        reach = ["ssh", "-nNT", "-i", str(made.lab.key), "-o", f"UserKnownHostsFile={made.lab.folder / 'known_hosts'}"]
        tunnel = subprocess.Popen(
            [*reach, "-L", f"{socket}:/var/run/docker.sock", f"root@{made.hosts['builder'].address}"]
        )
        try:
            until(socket.exists, "Docker's socket is here")
            yield Bundled(
                made, builder, folder, {"DOCKER_HOST": f"unix://{socket}", "PATH": f"{commands}:{os.environ['PATH']}"}
            )
        finally:
            tunnel.kill()
            tunnel.wait()
    docker.clear_cgroups()
    shutil.rmtree(folder)


def _layers(host: Host) -> str:
    return host.ssh("docker inspect --format '{{.RootFS.Layers}}' $(docker image ls -q llm-ray)").stdout


def test_without_docker_here_it_is_told_what_to_do(bundled: Bundled) -> None:
    run = bundled.cluster.play(
        "bundle.yml", ok=False, DOCKER_HOST="unix:///nowhere/docker.sock", PATH=bundled.docker["PATH"]
    )
    assert run.code == 2
    assert "localhost: bundle_image: the control machine builds the image, and Docker does not answer here" in " ".join(
        run.output.split()
    )


def test_the_image_is_built_here_once(bundled: Bundled) -> None:
    bundled.cluster.play("bundle.yml", **bundled.docker, timeout=1800)
    (archive,) = (bundled.folder / "image").iterdir()
    assert f"image/{archive.name}" in (bundled.folder / "SHA256SUMS").read_text()
    assert bundled.cluster.play("bundle.yml").changes() == []  # needs no Docker now


def test_a_damaged_archive_is_refused(bundled: Bundled) -> None:
    (archive,) = (bundled.folder / "image").iterdir()
    with archive.open("r+b") as file:
        file.seek(100_000)
        kept = file.read(1)
        file.seek(100_000)
        file.write(bytes([kept[0] ^ 1]))
    try:
        run = bundled.cluster.play("site.yml", ok=False)
    finally:
        with archive.open("r+b") as file:
            file.seek(100_000)
            file.write(kept)
    assert run.code == 2
    assert f"image/{archive.name}: FAILED: run bundle.yml again" in " ".join(run.output.split())


def test_site_takes_it_from_the_bundle(bundled: Bundled) -> None:
    cluster, head = bundled.cluster, bundled.cluster.head
    site = cluster.play("site.yml")
    assert "ray_node : Run docker build]" not in site.output
    cluster.wait_for_nodes(cluster.nodes)
    assert _layers(head) == _layers(bundled.builder.head)
    assert "archive" not in head.ssh("ls -A /opt/llm-ray/docker").stdout
    assert cluster.play("site.yml").changes() == []


def test_an_image_that_the_control_machine_builds_comes_from_there(bundled: Bundled) -> None:
    """It is built there already: with other contents it would have another tag."""
    cluster, head = bundled.cluster, bundled.cluster.head
    head.ssh("systemctl stop llm-ray-head; docker image rm --force $(docker image ls -q llm-ray)")
    from_here = ["-e", "ray_node_image_builder=control", "-e", "llm_ray_offline_bundle="]
    site = cluster.play("site.yml", *from_here, **bundled.docker)
    assert "changed: [head -> localhost" in site.output
    cluster.wait_for_nodes(cluster.nodes)
    assert _layers(head) == _layers(bundled.builder.head)
    assert cluster.play("site.yml", *from_here, **bundled.docker).changes() == []
