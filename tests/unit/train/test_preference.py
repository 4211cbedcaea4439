"""Preference losses equal the published formulas, for rows of any length and layout and any distribution of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llm_ray.conf.finetune import Dpo, FinetuneConf, Orpo
from llm_ray.data.encode import IGNORED
from llm_ray.evaluate.stage import _preferred
from llm_ray.train import loss as loss_module
from llm_ray.train import reference as reference_module
from llm_ray.train.batches import collate
from llm_ray.train.loss import SupervisedLoss, linear_log_probabilities
from llm_ray.train.model import adapt
from llm_ray.train.objectives import CrossEntropy, DirectPreference, OddsRatio, Preference, objective_of
from llm_ray.train.recipe import Setup, accumulate, average_gradients
from tests.unit.train.answers import learned, reference_of, setup_of, tiny

# Prompt, chosen, rejected: of different lengths, of one token, and of several turns (such as with a tool's result).
PAIRS: list[tuple[list[int], list[int], list[int]]] = [
    ([5, 9, 30, 7], [11, 12, 44], [13, 2]),
    ([8, 3], [6], [4, 21, 22, 23, 50, 51, 52, 53, 54]),
    ([17, 23, 42, 61, 1, 4, 6], [8, 30, 20, -21, -22, 33, 34], [9, 10, 19]),
    ([40, 41, 42], [2, 2, 2, 2], [2, 2, 3, 2]),
]
"""Tokens below zero are not supervised."""
CONFS = [
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.1},
    {"loss": "sigmoid", "sft_weight": 0.7},
    {"loss": "robust", "label_smoothing": 0.2},
    {"loss": "ipo", "beta": 0.05},
    {"loss": "ipo", "beta": 1.0, "sft_weight": 1.0},
    {"loss": "hinge", "beta": 2.0},
    {"loss": "orpo"},
    {"loss": "orpo", "beta": 3.0},
]
each_loss = pytest.mark.parametrize("settings", CONFS, ids=lambda s: "-".join(map(str, s.values())))


def pairs(rows: list[tuple[list[int], list[int], list[int]]] = PAIRS) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "chosen": []}
    for prompt, *answers in rows:
        ids = [[*prompt, *map(abs, answer)] for answer in answers]
        labels = [[*[IGNORED] * len(prompt), *(t if t > 0 else IGNORED for t in answer)] for answer in answers]
        columns["input_ids"].append(ids[0] + ids[1])
        columns["labels"].append(labels[0] + labels[1])
        columns["chosen"].append(len(ids[0]))
    return datasets.Dataset.from_dict(columns)


def objective(settings: dict[str, Any]) -> Preference:
    if settings["loss"] == "orpo":
        return OddsRatio(Orpo(**{key: value for key, value in settings.items() if key != "loss"}))
    return DirectPreference(Dpo(**settings))


# An independent implementation of the papers, one pair and one token at a time.


def straightforward(policy: nn.Module, base: nn.Module, dpo: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Returns the mean loss over PAIRS with its graph, and the rewards."""

    def log_probability(model: nn.Module, prompt: list[int], answer: list[int]) -> tuple[Tensor, int]:
        ids = [*prompt, *map(abs, answer)]
        logits = model(torch.tensor([ids])).logits[0].double()
        terms = [
            torch.log(torch.softmax(logits[len(prompt) + i - 1], 0)[token])
            for i, token in enumerate(answer)
            if token > 0
        ]
        return torch.stack(terms).sum(), len(terms)

    beta, epsilon, weight = dpo.get("beta", 0.1), dpo.get("label_smoothing", 0.0), dpo.get("sft_weight", 0.0)
    losses, chosen_rewards, rejected_rewards = [], [], []
    for prompt, chosen, rejected in PAIRS:
        w, w_tokens = log_probability(policy, prompt, chosen)
        r, r_tokens = log_probability(policy, prompt, rejected)
        with torch.no_grad():
            w0, r0 = (log_probability(base, prompt, answer)[0] for answer in (chosen, rejected))
        h = (w - w0) - (r - r0)
        if dpo["loss"] == "ipo":  # arXiv:2310.12036, eq. 17, with means over tokens
            loss = ((w - w0) / w_tokens - (r - r0) / r_tokens - 1 / (2 * beta)) ** 2
        elif dpo["loss"] == "hinge":  # arXiv:2305.10425, with the ratio to the base model as the score
            loss = torch.clamp(1 - beta * h, min=0)
        else:  # arXiv:2305.18290, eq. 7
            right, wrong = -torch.log(1 / (1 + torch.exp(-beta * h))), -torch.log(1 / (1 + torch.exp(beta * h)))
            if dpo["loss"] == "robust":  # arXiv:2403.00409, eq. 7
                loss = ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon)
            else:
                loss = (1 - epsilon) * right + epsilon * wrong
        if dpo["loss"] == "orpo":  # arXiv:2403.07691, eq. 3 to 7
            p_w, p_r = torch.exp(w / w_tokens), torch.exp(r / r_tokens)
            odds_ratio = (p_w / (1 - p_w)) / (p_r / (1 - p_r))
            loss = -w / w_tokens - beta * torch.log(1 / (1 + torch.exp(-torch.log(odds_ratio))))
            w, w0, r, r0 = w / w_tokens, torch.tensor(0), r / r_tokens, torch.tensor(0)  # as rewards are reported
        losses.append(loss - weight * w / w_tokens)
        chosen_rewards.append(beta * (w - w0).item())
        rejected_rewards.append(beta * (r - r0).item())
    margins = [a - b for a, b in zip(chosen_rewards, rejected_rewards, strict=True)]
    count = len(PAIRS)
    return torch.stack(losses).mean(), {
        "rewards/chosen": sum(chosen_rewards) / count,
        "rewards/rejected": sum(rejected_rewards) / count,
        "rewards/margins": sum(margins) / count,
        "rewards/accuracies": sum(margin > 0 for margin in margins) / count,
    }


def references(base: LlamaForCausalLM) -> Tensor:
    module = SupervisedLoss(base, base, packed=False)
    with torch.no_grad():
        return module.log_probabilities(collate(pairs(), [0, 1, 2, 3], packed=False)).view(-1, 2)


def step(setup: Setup, passes: list[list[int]], reference: Tensor) -> dict[str, float]:
    """The figures of a step of these passes; the gradients are left in the module."""
    sums, weight, _ = accumulate(setup, [collate(pairs(), rows, setup.packed, reference) for rows in passes])
    average_gradients(setup.module, 1 / weight)
    return setup.objective.means(sums, weight)


@each_loss
@pytest.mark.parametrize("blockwise", [False, True], ids=["logits", "blockwise"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_losses_gradients_and_rewards_are_those_of_the_papers(
    settings: dict[str, Any], packed: bool, blockwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * 64 * 16)  # several blocks
    base, policy, ours = tiny(0), tiny(1), tiny(1)
    wanted, rewards = straightforward(policy, base, settings)
    wanted.backward()
    setup = setup_of(ours, objective(settings), packed=packed, blockwise=blockwise)
    sums, weight, tokens = accumulate(setup, [collate(pairs(), [0, 1, 2, 3], packed, references(base))])
    average_gradients(setup.module, 1 / weight)
    given = setup.objective.means(sums, weight)
    assert weight == 4 and tokens == sum(map(len, pairs()["input_ids"]))
    assert given["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    for name, reward in rewards.items():
        assert given[name] == pytest.approx(reward, rel=1e-4, abs=1e-5), name
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@each_loss
@pytest.mark.parametrize("dealt", [[[0], [1], [2], [3]], [[3, 0], [2, 1]], [[2], [], [0, 1, 3]]], ids=str)
def test_how_pairs_are_dealt_out_to_passes_changes_nothing(settings: dict[str, Any], dealt: list[list[int]]) -> None:
    base = references(tiny(0))

    def figures(passes: list[list[int]]) -> tuple[dict[str, float], list[Tensor]]:
        setup = setup_of(tiny(1), objective(settings), packed=True, blockwise=True)
        found = step(setup, passes, base)
        return found, [p.grad for p in setup.module.parameters() if p.grad is not None]

    (together, all_gradients), (apart, gradients) = figures([[0, 1, 2, 3]]), figures(dealt)
    assert apart == pytest.approx(together, rel=1e-4, abs=1e-6)
    for one, other in zip(gradients, all_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_base_model_itself_has_no_rewards_and_the_loss_of_a_coin() -> None:
    model = tiny(0)
    setup = setup_of(model, objective({"loss": "sigmoid"}), packed=False, blockwise=False)
    sums, weight, _ = accumulate(setup, [collate(pairs(), [0, 1, 2, 3], False, references(model))])
    figures = setup.objective.means(sums, weight)
    assert figures["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert figures["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert figures["logps/chosen"] == pytest.approx(references(model)[:, 0].mean().item(), rel=1e-5)


def test_accuracy_and_log_probabilities_by_hand() -> None:
    objective = DirectPreference(Dpo(beta=0.5))
    given, base = torch.tensor([[-1.0, -4.0], [-6.0, -2.0]]), torch.tensor([[-2.0, -4.0], [-5.0, -3.0]])
    figures = objective.means(objective.figures_of(given, base, torch.ones(2, 2)).tolist(), 2)
    assert figures == pytest.approx(
        {
            "loss": (-math.log(1 / (1 + math.exp(-0.5))) - math.log(1 / (1 + math.exp(1.0)))) / 2,
            "rewards/chosen": (0.5 - 0.5) / 2,
            "rewards/rejected": (0.0 + 0.5) / 2,
            "rewards/margins": (0.5 - 1.0) / 2,
            "rewards/accuracies": 0.5,
            "logps/chosen": -3.5,
            "logps/rejected": -3.0,
        }
    )


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_odds_ratio_by_hand(beta: float) -> None:
    objective = OddsRatio(Orpo(beta=beta))
    given = torch.tensor([[4 * math.log(0.5), 2 * math.log(0.2)]])
    figures = objective.means(objective.figures_of(given, given, torch.tensor([[4, 2]])).tolist(), 1)
    assert figures == pytest.approx(  # odds of 1 and of 1 to 4
        {
            "loss": math.log(2) - beta * math.log(4 / 5),
            "nll_loss": math.log(2),
            "log_odds_ratio": math.log(4),
            "rewards/chosen": beta * math.log(0.5),
            "rewards/rejected": beta * math.log(0.2),
            "rewards/margins": beta * math.log(2.5),
            "rewards/accuracies": 1.0,
            "logps/chosen": math.log(0.5),
            "logps/rejected": math.log(0.2),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1e-3, -0.69, -0.7, -50.0, -3000.0])
@pytest.mark.parametrize("rejected", [0.0, -1e-6, -1.0, -3000.0])
def test_odds_of_answers_that_are_certain_or_impossible_are_finite(chosen: float, rejected: float) -> None:
    given = torch.tensor([[chosen, rejected]], requires_grad=True)
    figures = OddsRatio(Orpo()).figures_of(given, given, torch.ones(1, 2))
    figures[0].backward()
    assert torch.isfinite(figures).all()
    assert given.grad is not None and torch.isfinite(given.grad).all() and given.grad[0, 0] < 0


def test_the_evaluation_of_an_objective_without_a_reference_measures_the_base_as_well(conf: FinetuneConf) -> None:
    orpo = conf.model_copy(update={"tuning": conf.tuning.model_copy(update={"objective": "orpo"})})
    base = {0: ([-10.0, -10.0], [4, 5]), 1: ([-5.0, -7.0], [2, 3])}
    found = _preferred(orpo, base, base, True)
    assert found.keys() == {"validation_loss", "reward_accuracy", "reward_margin"}
    assert found["reward_accuracy"] == 0


def test_the_evaluation_measures_the_trained_model_against_its_base(conf: FinetuneConf) -> None:
    base = {0: ([-10.0, -10.0], [4, 4]), 1: ([-5.0, -7.0], [2, 3])}
    trained = {1: ([-6.0, -7.0], [2, 3]), 0: ([-8.0, -12.0], [4, 4])}
    assert _preferred(conf, base, base, True) == {"validation_loss": pytest.approx(math.log(2))}
    assert _preferred(conf, base, trained, False) == pytest.approx(
        {
            "validation_loss": (math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(0.1))) / 2,
            "reward_accuracy": 0.5,
            "reward_margin": (0.4 - 0.1) / 2,
        }
    )


# How batches are laid out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_pair_is_two_rows_that_do_not_see_each_other(packed: bool) -> None:
    batch = collate(pairs(), [1, 2], packed, torch.arange(8.0).view(4, 2))
    assert batch.row_lengths == [3, 11, 14, 10]
    assert batch.pairs is not None
    assert batch.pairs.tokens.tolist() == [[1, 9], [5, 3]]
    assert batch.row_of.tolist() == [0] + [1] * 9 + [2] * 5 + [3] * 3
    assert batch.pairs.reference.tolist() == [[2, 3], [4, 5]]
    assert batch.targets.tolist() == [6, 4, 21, 22, 23, 50, 51, 52, 53, 54, 8, 30, 20, 33, 34, 9, 10, 19]
    assert batch.tokens == 38
    assert batch.position_ids.flatten()[batch.supervised[0]] == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("settings", [{"loss": "sigmoid", "sft_weight": 1.0}, {"loss": "orpo"}], ids=str)
def test_without_pairs_there_is_something_to_compute_but_nothing_to_learn(
    settings: dict[str, Any], packed: bool, blockwise: bool
) -> None:
    setup = setup_of(tiny(), objective(settings), packed=packed, blockwise=blockwise)
    sums, weight, tokens = accumulate(setup, [collate(pairs(), [], packed, torch.zeros(4, 2))])
    assert (sums, weight, tokens) == ([0.0] * len(setup.objective.figures), 0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in setup.module.parameters()), "fsdp waits for all of them"


@pytest.mark.parametrize("learns", ["hidden", "head", "both"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 37])
def test_blockwise_log_probabilities(learns: str, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * 101 * 16)
    torch.manual_seed(0)
    hidden = torch.randn(rows, 12, requires_grad=learns != "head")
    weight = torch.randn(101, 12, requires_grad=learns != "hidden")
    offset = torch.randn(101, requires_grad=learns != "hidden") if bias else None
    target, scale = torch.randint(101, (rows,)), torch.randn(rows)
    inputs = [t for t in (hidden, weight, offset) if t is not None and t.requires_grad]
    expected = torch.log_softmax(nn.functional.linear(hidden, weight, offset), 1)[torch.arange(rows), target]
    wanted = torch.autograd.grad((expected * scale).sum(), inputs)
    given = linear_log_probabilities(hidden, weight, offset, target)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    for gradient, right in zip(torch.autograd.grad((given * scale).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


# The base model's log-probabilities ----------------------------------------------------------------------------------


def adapted(conf: FinetuneConf) -> SupervisedLoss:
    return adapt(conf, tiny(), torch.float32, packed=False)


@pytest.fixture
def conf() -> FinetuneConf:
    return FinetuneConf.model_validate(
        {
            "name": "t",
            "model": {"base": "b"},
            "data": {"train": "x.jsonl", "packing": False},
            "tuning": {"objective": "dpo", "lora": {"r": 4, "dropout": 0.5}},
        }
    )


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor | None]:
    monkeypatch.setattr(reference_module, "PART", 3)

    def compute(module: nn.Module) -> Tensor | None:
        return reference_of(module, pairs(), tmp_path)

    return compute


def test_the_reference_is_the_model_with_its_adapter_off(
    conf: FinetuneConf, kept: Callable[..., Tensor | None]
) -> None:
    assert isinstance(objective_of(conf), Preference)
    module = adapted(conf)
    found = kept(module)
    assert found is not None and module.training
    assert isinstance(module.model, PeftModel)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    module.eval()
    batch = collate(pairs(), [0, 1, 2, 3], packed=False)
    with torch.no_grad():
        moved = module(batch, log_probabilities=True).view(-1, 2)
        assert not torch.allclose(moved, found, atol=1e-2), "the adapter does something"
    torch.testing.assert_close(found, references(tiny()), rtol=1e-5, atol=1e-4)


def test_what_is_kept_is_not_computed_again_and_what_is_torn_is(
    conf: FinetuneConf, kept: Callable[..., Tensor | None], tmp_path: Path
) -> None:
    first = kept(adapted(conf))
    names = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert names == ["000000000.npy", "000000003.npy"] and first is not None
    np.save(tmp_path / "kept" / names[0], np.full((3, 2), -7.0))
    (tmp_path / "kept" / names[1]).write_bytes(b"torn")
    again = kept(adapted(conf))
    assert again is not None
    assert again[:3].tolist() == [[-7.0, -7.0]] * 3, "taken as it was kept"
    torch.testing.assert_close(again[3:], first[3:])


def test_a_stop_between_two_parts_keeps_the_first(
    conf: FinetuneConf, kept: Callable[..., Tensor | None], tmp_path: Path
) -> None:
    module = adapted(conf)
    module.register_forward_hook(lambda *_: (tmp_path / ".stop").touch())
    assert kept(module) is None
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["000000000.npy"]
    (tmp_path / ".stop").unlink()
    assert kept(adapted(conf)) is not None


# Learning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"loss": loss} for loss in ("sigmoid", "ipo", "hinge", "orpo")], ids=str)
def test_a_model_comes_to_prefer_what_was_chosen(settings: dict[str, Any], conf: FinetuneConf) -> None:
    chosen = {"objective": "orpo"} if settings["loss"] == "orpo" else {"dpo": Dpo(**settings)}
    tuning = conf.tuning.model_copy(update=chosen)
    module = adapted(conf.model_copy(update={"tuning": tuning}))
    base = references(tiny())
    figures = learned(module, lambda setup: step(setup, [[0, 1, 2, 3]], base))
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert figures[-1]["rewards/accuracies"] == 1
    assert figures[-1]["rewards/margins"] > 0.1


def test_other_objectives_have_the_loss_of_tokens() -> None:
    conf = FinetuneConf.model_validate({"name": "t", "model": {"base": "b"}, "data": {"train": "x.jsonl"}})
    assert objective_of(conf) == CrossEntropy()
