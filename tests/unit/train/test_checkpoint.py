"""Checkpoints: contents, restoring, and damaged or half-written ones."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llm_ray.errors import RunError, TrainError
from llm_ray.train import checkpoint as checkpoints
from llm_ray.train.checkpoint import BEST, Progress, list_checkpoints, step_of


class Tied(nn.Module):
    """A frozen embedding tied to the output head, and a trainable adapter, like a small language model with LoRA."""

    def __init__(self, learns: bool = False, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, width)
        self.head = nn.Linear(width, 500, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(learns)
        self.adapter = nn.Linear(width, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.adapter(self.embed(ids)))
        return out


def trained(steps: int = 2, learns: bool = False) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(1)
    module = Tied(learns)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        step(module, optimizer)
    return module, optimizer


def step(module: Tied, optimizer: torch.optim.Optimizer) -> float:
    loss = nn.functional.cross_entropy(module(torch.randint(500, (16,))), torch.zeros(16, dtype=torch.int64))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_training_goes_on_as_if_it_had_not_been_broken_off(tmp_path: Path) -> None:
    module, optimizer = trained()
    progress = Progress(step=2, best_validation_loss=1.5, best_step=1, validations_without_improvement=1)
    path = checkpoints.save(tmp_path, module, optimizer, progress, rank=0)
    unbroken = [*(step(module, optimizer) for _ in range(3)), random.random(), float(np.random.rand())]

    other, fresh = trained(steps=0)
    random.random()
    assert checkpoints.load(path, other, fresh, rank=0) == progress
    assert [*(step(other, fresh) for _ in range(3)), random.random(), float(np.random.rand())] == unbroken


@pytest.mark.parametrize("learns", [False, True])
def test_weights_that_learn_are_in_it_once_and_frozen_ones_not_at_all(tmp_path: Path, learns: bool) -> None:
    module, optimizer = trained(learns=learns)
    path = checkpoints.save(tmp_path, module, optimizer, Progress(step=2), rank=0)
    saved = torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    names = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    assert names == {"adapter.weight", "adapter.bias"} | ({"embed.weight"} if learns else set())
    again = Tied(learns)
    checkpoints.load_weights(path, again)
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True) if a.requires_grad
    )
    assert again.head.weight is again.embed.weight


def test_the_last_few_are_kept_and_debris_goes(tmp_path: Path) -> None:
    module, optimizer = trained()
    for number in (1, 2, 3, 4):
        checkpoints.save(tmp_path, module, optimizer, Progress(step=number), rank=0)
    checkpoints.save_best(tmp_path, module, rank=0)
    (tmp_path / ".step_00000005.partial").mkdir()
    checkpoints.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEST, "step_00000003", "step_00000004"]
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [3, 4]


def test_the_same_step_and_the_best_can_be_written_again(tmp_path: Path) -> None:
    module, optimizer = trained()
    for _ in range(2):
        checkpoints.save(tmp_path, module, optimizer, Progress(step=1), rank=0)
        checkpoints.save_best(tmp_path, module, rank=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEST, "step_00000001"]


@pytest.mark.parametrize("part", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", ["cut", "empty", "scrambled", "gone"])
def test_a_damaged_one_is_named_with_the_way_on(tmp_path: Path, part: str, damage: str) -> None:
    module, optimizer = trained()
    earlier, newest = (checkpoints.save(tmp_path, module, optimizer, Progress(step=n), rank=0) for n in (1, 2))
    whole = (newest / part).read_bytes()
    content = {"cut": whole[: len(whole) // 2], "empty": b"", "scrambled": bytes(len(whole)), "gone": None}[damage]
    (newest / part).unlink()
    if content is not None:
        (newest / part).write_bytes(content)
    with pytest.raises(TrainError, match=rf"{newest} is damaged.*--resume {earlier}\).*--resume no") as error:
        checkpoints.load(newest, *trained(), rank=0)
    assert "\n" not in str(error.value)
    assert "FrameSummary" not in str(error.value)
    with pytest.raises(TrainError, match="is damaged"):
        checkpoints.load_weights(newest, Tied())
    assert checkpoints.load(earlier, *trained(), rank=0).step == 1


def test_one_of_another_model_is_named(tmp_path: Path) -> None:
    module, optimizer = trained()
    path = checkpoints.save(tmp_path, module, optimizer, Progress(step=1), rank=0)
    wide = Tied(width=16)
    with pytest.raises(TrainError, match=r"does not match the conf's model and tuning.*Resume from the start"):
        checkpoints.load(path, wide, torch.optim.AdamW(wide.adapter.parameters()), rank=0)


def test_a_failed_write_leaves_the_earlier_ones(tmp_path: Path) -> None:
    module, optimizer = trained()
    checkpoints.save(tmp_path, module, optimizer, Progress(step=1), rank=0)
    (tmp_path / ".step_00000002.partial").write_text("a file in the way")
    with pytest.raises(
        TrainError, match=r"step_00000002 could not be written: .*GiB are free there; earlier checkpoints are complete"
    ):
        checkpoints.save(tmp_path, module, optimizer, Progress(step=2), rank=0)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [1]


def test_half_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    module, optimizer = trained()
    path = checkpoints.save(tmp_path, module, optimizer, Progress(step=1), rank=0)
    shutil.copytree(path, tmp_path / "step_00000002", ignore=shutil.ignore_patterns(".metadata"))
    shutil.copytree(path, tmp_path / "step_3")
    assert list_checkpoints(tmp_path) == [path]
    assert list_checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(RunError, match="expected a folder called step_NNNNNNNN"):
        step_of(tmp_path / "step_3")
