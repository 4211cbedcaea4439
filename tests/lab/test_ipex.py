"""The profile ipex on a host of its own, in both runtimes: installed by the role and in the image, a finetune and its endpoint in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_ray.serve.protect.keys import new_secret
from tests.lab import cluster as lab_cluster
from tests.lab import docker
from tests.lab.cluster import Cluster, Run
from tests.lab.workflows import Workflow, llm_ray

pytestmark = [pytest.mark.lab, pytest.mark.ipex, pytest.mark.timeout(3000)]

_VERSIONS = """
import json, ray
ray.init(log_to_driver=False, logging_level="error")
@ray.remote
def versions():
    import intel_extension_for_pytorch, torch
    return torch.__version__, intel_extension_for_pytorch.__version__, torch.cuda.is_available()
print("VERSIONS", json.dumps(ray.get(versions.remote())))
"""


@dataclass
class Made:
    cluster: Cluster
    first: Run
    work: Workflow


@pytest.fixture(scope="module", params=["bare_metal", "docker"])
def made(request: pytest.FixtureRequest, lab_ready: None, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    in_docker = request.param == "docker"
    variables: dict[str, Any] = docker.VARIABLES if in_docker else {}
    with lab_cluster.cluster({"ray_head": ["head"], "ray_workers": []}, llm_ray_profile="ipex", **variables) as cluster:
        if in_docker:
            docker.prepare(cluster.head)
            docker.import_base(cluster)
        first = cluster.play("site.yml", timeout=3000)
        cluster.wait_for_nodes(cluster.nodes)
        yield Made(cluster, first, Workflow(cluster, tmp_path_factory.mktemp("workflow"), smollm2))
    if in_docker:
        docker.clear_cgroups()


def test_a_task_on_the_node_has_the_extension_and_its_torch(made: Made) -> None:
    torch, extension, gpu = json.loads(made.cluster.ray(_VERSIONS).rpartition("VERSIONS ")[2])
    assert torch.startswith("2.8.0")
    assert extension.startswith("2.8.0")
    assert not gpu


def test_a_second_run_changes_nothing(made: Made) -> None:
    second = made.cluster.play("site.yml")
    assert second.changed == 0, second.changes()


def test_a_finetune_with_the_extension_learns_as_one_without(made: Made) -> None:
    losses = {}
    for accelerator in ("ipex", "torch"):
        settings = {"training.accelerator": accelerator, "training.precision": "fp32", "stages": ["prepare", "train", "export"]}
        made.cluster.play("finetune.yml", *made.work.finetune(accelerator, **settings), timeout=1500)
        assert made.work.told(accelerator)["state"] == "done"
        losses[accelerator] = [loss for _, loss in sorted(made.work.losses(accelerator).items())]
    assert len(losses["ipex"]) == 4
    assert losses["ipex"] == pytest.approx(losses["torch"], rel=1e-4)


def test_the_engine_transformers_answers_with_it(made: Made) -> None:
    made.cluster.play("serve.yml", *made.work.serve("ipex"), timeout=1500)
    assert (made.work.ask("ipex"), made.work.ask("ipex", new_secret())) == (200, 401)
    assert "optimized by intel-extension-for-pytorch" in llm_ray(made.cluster, "serve", "logs", "ipex")
