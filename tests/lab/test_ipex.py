"""The profile ipex on a host of its own, in both runtimes: installed by the role and in the image, a finetune and its
endpoint in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_ray.serve.gateway.protect.keys import new_secret
from tests.lab import cluster as lab_cluster
from tests.lab import docker
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


@pytest.fixture(scope="module", params=["bare_metal", "docker"])
def work(
    request: pytest.FixtureRequest, lab_ready: None, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workflow]:
    in_docker = request.param == "docker"
    variables: dict[str, Any] = docker.VARIABLES if in_docker else {}
    with lab_cluster.cluster({"ray_head": ["head"], "ray_workers": []}, llm_ray_profile="ipex", **variables) as cluster:
        if in_docker:
            docker.prepare(cluster.head)
            docker.import_base(cluster)
        cluster.play("site.yml", timeout=3000)
        cluster.wait_for_nodes(cluster.nodes)
        yield Workflow(cluster, tmp_path_factory.mktemp("workflow"), smollm2)
    if in_docker:
        docker.clear_cgroups()


def test_a_task_on_the_node_has_the_extension_and_its_torch(work: Workflow) -> None:
    torch, extension, gpu = json.loads(work.cluster.ray(_VERSIONS).rpartition("VERSIONS ")[2])
    assert torch.startswith("2.8.0")
    assert extension.startswith("2.8.0")
    assert not gpu


def test_a_second_run_changes_nothing(work: Workflow) -> None:
    second = work.cluster.play("site.yml")
    assert second.changed == 0, second.changes()


def test_a_finetune_with_the_extension_learns_as_one_without(work: Workflow) -> None:
    losses = {}
    for accelerator in ("ipex", "torch"):
        settings = {
            "training.accelerator": accelerator,
            "training.precision": "fp32",
            "stages": ["prepare", "train", "export"],
        }
        work.cluster.play("finetune.yml", *work.finetune(accelerator, **settings), timeout=1500)
        assert work.told(accelerator)["state"] == "done"
        losses[accelerator] = [loss for _, loss in sorted(work.losses(accelerator).items())]
    assert len(losses["ipex"]) == 4
    assert losses["ipex"] == pytest.approx(losses["torch"], rel=1e-4)


def test_the_engine_transformers_answers_with_it(work: Workflow) -> None:
    work.cluster.play("serve.yml", *work.serve("ipex"), timeout=1500)
    assert (work.ask("ipex"), work.ask("ipex", new_secret())) == (200, 401)
    assert "optimized by intel-extension-for-pytorch" in llm_ray(work.cluster, "serve", "logs", "ipex")
