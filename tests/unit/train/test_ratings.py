"""The losses of kto equal the papers' formulas, on rows of any length and layout, and however a step is dealt out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llm_ray.conf.finetune import FinetuneConf, Kto
from llm_ray.data.encode import IGNORED
from llm_ray.evaluate.stage import _agreeing
from llm_ray.models.load import Base, Location
from llm_ray.train import loss as loss_module
from llm_ray.train import reference as reference_module
from llm_ray.train.batches import Mismatches, Schedule, collate, mismatches_of, whole_split
from llm_ray.train.loss import SupervisedLoss
from llm_ray.train.model import adapt
from llm_ray.train.objectives import KahnemanTversky, divergence_of, objective_of
from llm_ray.train.recipe import Setup, accumulate, average_gradients
from llm_ray.train.reference import reference_folder
from tests.unit.train.answers import learned, reference_of, setup_of, tiny

# Prompt, answer, rating: of different lengths, of one token, and of several turns (such as with a tool's result).
ROWS: list[tuple[list[int], list[int], bool]] = [
    ([5, 9, 30, 7], [11, 12, 44], True),
    ([8, 3], [4, 21, 22, 23, 50, 51, 52, 53, 54], False),
    ([17, 23, 42, 61, 1, 4, 6], [8, 30, 20, -21, -22, 33, 34], True),
    ([40, 41, 42], [2], False),
    ([40, 41, 42], [2, 6], True),
]
"""Tokens below zero are not supervised."""
ALL = list(range(len(ROWS)))
CONFS: list[dict[str, Any]] = [
    {},
    {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    {"beta": 2.0, "undesirable_weight": 0.0},
    {"loss": "apo_zero_unpaired", "beta": 0.3},
]
each_loss = pytest.mark.parametrize("settings", CONFS, ids=str)


def rated(rows: list[tuple[list[int], list[int], bool]] = ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[*prompt, *map(abs, answer)] for prompt, answer, _ in rows],
            "labels": [[*[IGNORED] * len(p), *(t if t > 0 else IGNORED for t in answer)] for p, answer, _ in rows],
            "good": [good for *_, good in rows],
            "prompt": [len(prompt) for prompt, *_ in rows],
        }
    )


def mismatched(longest: int = 64) -> Mismatches:
    """Each prompt with the answer of the row before."""
    return mismatches_of(rated(), np.roll(ALL, 1), longest)


def objective(settings: dict[str, Any]) -> KahnemanTversky:
    return KahnemanTversky(Kto(**settings))


def references(base: LlamaForCausalLM) -> Tensor:
    """Of the rows' own answers, and of the mismatched ones."""
    module = SupervisedLoss(base, base, packed=False)
    with torch.no_grad():
        columns = [collate(rated(), ALL, False, mismatches=of) for of in (None, mismatched())]
        return torch.stack([module.log_probabilities(batch) for batch in columns], 1)


def step(setup: Setup, passes: list[list[int]], settings: dict[str, Any], reference: Tensor) -> dict[str, float]:
    """The figures of a step of these passes; the gradients are left in the module."""
    compared = []
    if settings.get("loss", "kto") == "kto":
        compared = [collate(rated(), rows, setup.packed, reference, mismatched()) for rows in passes]
    sums, weight, _ = accumulate(setup, [collate(rated(), rows, setup.packed, reference) for rows in passes], compared)
    average_gradients(setup.module, 1 / weight)
    return setup.objective.means(sums, weight)


# An independent implementation of the papers, one row and one token at a time.


def straightforward(policy: nn.Module, base: nn.Module, kto: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Returns the mean loss over ROWS with its graph, and the figures."""

    def log_ratio(prompt: list[int], answer: list[int]) -> tuple[Tensor, float]:
        ids, sums = torch.tensor([[*prompt, *map(abs, answer)]]), []
        for model in (policy, base):
            probabilities = torch.softmax(model(ids).logits[0].double(), 1)
            at = [(len(prompt) + i - 1, token) for i, token in enumerate(answer) if token > 0]
            sums.append(torch.stack([torch.log(probabilities[position, token]) for position, token in at]).sum())
        return sums[0] - sums[1].detach(), sums[0].item()

    beta = kto.get("beta", 0.1)
    z0 = 0.0
    if kto.get("loss", "kto") == "kto":  # arXiv:2402.01306, section 4.1
        others = [log_ratio(prompt, ROWS[i - 1][1])[0].item() for i, (prompt, *_) in enumerate(ROWS)]
        z0 = max(0.0, sum(others) / len(others))
    losses, good, bad, agree = [], [], [], []
    for prompt, answer, is_good in ROWS:
        ratio, log_probability = log_ratio(prompt, answer)
        if is_good:
            value = 1 / (1 + torch.exp(-beta * (ratio - z0)))
            losses.append(kto.get("desirable_weight", 1.0) * (1 - value))
        else:
            value = 1 / (1 + torch.exp(-beta * (z0 - ratio)))
            losses.append(kto.get("undesirable_weight", 1.0) * (1 - value))
        (good if is_good else bad).append((beta * ratio.item(), log_probability))
        agree.append(value.item() > 0.5)
    figures = {"kl": z0, "rewards/accuracies": sum(agree) / len(agree)}
    for name, values in (("chosen", good), ("rejected", bad)):
        figures[f"rewards/{name}"], figures[f"logps/{name}"] = (sum(of) / len(of) for of in zip(*values, strict=True))
    figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    if kto.get("loss", "kto") != "kto":
        del figures["kl"]
    return torch.stack(losses).mean(), figures


@each_loss
@pytest.mark.parametrize("blockwise", [False, True], ids=["logits", "blockwise"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_losses_gradients_rewards_and_divergence_are_those_of_the_papers(
    settings: dict[str, Any], packed: bool, blockwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * 64 * 16)  # several blocks
    base, policy, ours = tiny(0), tiny(1), tiny(1)
    wanted, figures = straightforward(policy, base, settings)
    wanted.backward()
    found = step(
        setup_of(ours, objective(settings), packed=packed, blockwise=blockwise), [ALL], settings, references(base)
    )
    assert found == pytest.approx({"loss": wanted.item()} | figures, rel=1e-4, abs=1e-5)
    assert settings.get("loss") or found["kl"] > 0, "the divergence takes part"
    for (name, parameter), of_paper in zip(ours.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, of_paper.grad, rtol=1e-3, atol=1e-5, msg=name)


@each_loss
@pytest.mark.parametrize("dealt", [[[0], [1], [2], [3], [4]], [[3, 0], [2, 1, 4]], [[2], [], [0, 1, 3, 4]]], ids=str)
def test_how_rows_are_dealt_out_to_passes_changes_nothing(settings: dict[str, Any], dealt: list[list[int]]) -> None:
    reference, steps = references(tiny(0)), []
    for passes in ([ALL], dealt):
        setup = setup_of(tiny(1), objective(settings), packed=True, blockwise=True)
        steps.append((step(setup, passes, settings, reference), [p.grad for p in setup.module.parameters()]))
    (together, all_gradients), (apart, gradients) = steps
    assert apart == pytest.approx(together, rel=1e-4, abs=1e-6)
    for one, other in zip(gradients, all_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("blockwise", [False, True])
def test_without_rows_there_is_something_to_compute_but_nothing_to_learn(packed: bool, blockwise: bool) -> None:
    setup = setup_of(tiny(), objective({}), packed=packed, blockwise=blockwise)
    batches = [collate(rated(), [], packed, torch.zeros(5, 2), of) for of in (None, mismatched())]
    sums, weight, tokens = accumulate(setup, batches[:1], batches[1:])
    assert (sums, weight, tokens) == ([0.0] * len(setup.objective.figures), 0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in setup.module.parameters()), "fsdp waits for all of them"


def test_figures_by_hand() -> None:
    objective = KahnemanTversky(Kto(beta=0.5, desirable_weight=2.0))
    given, base = torch.tensor([-1.0, -4.0, -6.0]), torch.tensor([-4.0, -4.0, -5.0])
    sums = objective.figures_of(given, base, torch.tensor([True, True, False]), divergence=1.0)
    found = objective.means(sums.tolist(), 3)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5 * 2, 0.5 * -1, 0.5 * 2)]
    assert found == pytest.approx(
        {
            "loss": (2 * (1 - sigmoid[0]) + 2 * (1 - sigmoid[1]) + 1 - sigmoid[2]) / 3,
            "kl": 1.0,
            "rewards/accuracies": 2 / 3,
            "rewards/chosen": (1.5 + 0) / 2,
            "rewards/rejected": -0.5,
            "logps/chosen": -2.5,
            "logps/rejected": -6.0,
            "rewards/margins": 1.25,
        }
    )


def test_a_step_of_one_rating_has_no_figures_of_the_other() -> None:
    objective = KahnemanTversky(Kto())
    sums = objective.figures_of(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([False]), 0.0)
    assert objective.means(sums.tolist(), 1).keys() == {
        "loss",
        "kl",
        "rewards/accuracies",
        "rewards/rejected",
        "logps/rejected",
    }


def test_the_divergence_is_a_mean_and_never_negative() -> None:
    assert (divergence_of(6.0, 3), divergence_of(-6.0, 3), divergence_of(0.0, 0)) == (2.0, 0.0, 0.0)


# Prompts with the answers of other rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_mismatched_row_has_its_prompt_and_the_answer_of_another(packed: bool) -> None:
    reference = torch.arange(10.0).view(5, 2)
    of = mismatched(longest=10)
    assert of.lengths.tolist() == [4 + 2, 2 + 3, 10, 3 + 7, 3 + 1]
    batch = collate(rated(), [1, 2], packed, reference, of)
    assert batch.row_lengths == [5, 10]
    assert batch.targets.tolist() == [11, 12, 44, 4, 21, 22], "cut at the longest"
    assert batch.ratings is not None
    assert batch.ratings.reference.tolist() == [3, 5]
    own = collate(rated(), [1, 2], packed, reference)
    assert own.ratings is not None
    assert own.ratings.reference.tolist() == [2, 4] and own.ratings.good.tolist() == [False, True]


@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 5))
def test_the_answers_of_a_step_are_those_of_its_own_rows(rows: int, batch_size: int, seed: int) -> None:
    schedule = Schedule(np.full(rows, 4), batch_size, 1000, True, seed, together=True)
    answer_of = schedule.neighbours()
    assert sorted(answer_of) == list(range(rows)) or rows % batch_size == 1
    assert (answer_of != np.arange(rows)).all()
    epochs = []
    for epoch in range(3):
        steps = [
            [row for pass_ in schedule.indices(epoch * schedule.steps_per_epoch + n, 0, 1) for row in pass_]
            for n in range(schedule.steps_per_epoch)
        ]
        for of_step in steps:
            assert len(of_step) == 1 or set(answer_of[of_step]) == set(of_step)
        epochs.append(sorted(map(sorted, steps)))
    assert epochs[0] == epochs[1] == epochs[2], "rows stay together"


def test_validation_takes_answers_from_half_the_data_away() -> None:
    assert whole_split(rated(), 64).answer_of.tolist() == [3, 4, 0, 1, 2]
    assert whole_split(rated(ROWS[:2]), 64).answer_of.tolist() == [1, 0]


# The base model's log-probabilities -----------------------------------------------------------------------------------


@pytest.fixture
def conf() -> FinetuneConf:
    return FinetuneConf.model_validate(
        {
            "name": "t",
            "model": {"base": "b"},
            "data": {"train": "x.jsonl", "packing": False},
            "tuning": {"objective": "kto", "lora": {"r": 4, "dropout": 0.5}},
            "training": {"global_batch_size": 4},
        }
    )


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor | None]:
    monkeypatch.setattr(reference_module, "PART", 3)

    def compute(conf: FinetuneConf, mismatches: Mismatches | None) -> Tensor | None:
        return reference_of(adapt(conf, tiny(), torch.float32, packed=False), rated(), tmp_path, mismatches)

    return compute


def test_the_reference_is_the_base_model_on_both_kinds_of_rows_and_is_kept(
    conf: FinetuneConf, kept: Callable[..., Tensor | None], tmp_path: Path
) -> None:
    assert isinstance(objective_of(conf), KahnemanTversky)
    first = kept(conf, mismatched())
    assert first is not None
    torch.testing.assert_close(first, references(tiny()), rtol=1e-5, atol=1e-4)
    names = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert names == ["000000000.npy", "000000003.npy"]
    np.save(tmp_path / "kept" / names[0], np.full((3, 2), -7.0))
    again = kept(conf, mismatched())
    assert again is not None and again[:3].tolist() == [[-7.0, -7.0]] * 3, "taken as it was kept"
    alone = kept(conf, None)
    assert alone is not None
    torch.testing.assert_close(alone, first[:, :1], rtol=1e-5, atol=1e-4)


def test_what_decides_the_mismatches_decides_where_the_reference_is_kept(conf: FinetuneConf) -> None:
    hub = Location("org/model", None)
    base = Base(conf.model, hub, hub)

    def folder(loss: str = "kto", **training: int) -> Path:
        changed = {"training": conf.training.model_copy(update=training)}
        tuning = conf.tuning.model_copy(update={"kto": conf.tuning.kto.model_copy(update={"loss": loss})})
        return reference_folder(conf.model_copy(update=changed | {"tuning": tuning}), base, "fp32")

    assert folder() == folder(validate_every=7)
    assert len({folder(), folder(seed=1), folder(global_batch_size=8), folder("apo_zero_unpaired")}) == 4
    assert folder("apo_zero_unpaired") == folder("apo_zero_unpaired", seed=1)


# Learning and evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"loss": "apo_zero_unpaired"}], ids=str)
def test_a_model_comes_to_agree_with_the_ratings(settings: dict[str, Any], conf: FinetuneConf) -> None:
    kto = {"kto": Kto(beta=0.5, **settings)}
    module = adapt(conf.model_copy(update={"tuning": conf.tuning.model_copy(update=kto)}), tiny(), torch.float32, False)
    reference = references(tiny())
    figures = learned(module, lambda setup: step(setup, [ALL], settings, reference))
    assert figures[0]["loss"] == pytest.approx(0.5), "the base model against itself"
    assert figures[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert figures[-1]["loss"] < 0.8 * figures[0]["loss"]
    assert figures[-1]["rewards/accuracies"] >= 0.8
    assert figures[-1]["rewards/margins"] > 0.1


def test_the_evaluation_measures_the_trained_model_against_its_base(conf: FinetuneConf) -> None:
    base = {0: (-10.0, True), 1: (-5.0, False), 2: (-3.0, False)}
    trained = {2: (-4.0, False), 1: (-4.0, False), 0: (-7.0, True)}
    assert _agreeing(conf, base, base, 0.0, True) == {"validation_loss": pytest.approx(0.5)}
    losses = [1 - 1 / (1 + math.exp(-0.1 * x)) for x in (3 - 1, 1 - 1, 1 + 1)]
    assert _agreeing(conf, base, trained, 3.0, False) == pytest.approx(
        {"validation_loss": sum(losses) / 3, "rating_accuracy": 2 / 3, "reward_margin": 0.3}
    )
    only = {0: (-10.0, True)}
    assert _agreeing(conf, only, only, 0.0, False).keys() == {"validation_loss", "rating_accuracy"}
