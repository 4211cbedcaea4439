"""vLLM's core with LoRA adapters: the base and each adapter answer with their own weights, whoever shares a batch with
them.

    pytest tests/integration/test_lora.py

All numbers of adapters and all kinds of layers go through one engine, one after the other: starting it takes longest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import BdLoraConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig

from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.serve.deployments.adapters import check_adapter
from llm_ray.serve.replica.server import ADAPTERS_AT_ONCE
from tests.integration import tiny
from tests.integration.lora import Engine, assert_right, expected, started

KINDS = {
    "attention": ("q_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "lm_head": ("lm_head",),
    "embedding": ("embed_tokens",),
}
# Settings of peft, by what they are refused for. Corda, loftq and arrow want data, packages or adapters to begin with.
FORMS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
        {"layers_to_transform": [1]},
        {"target_parameters": ["o_proj.weight"]},
    ],
    "init_lora_weights: olora": [{"init_lora_weights": "olora"}],
    "init_lora_weights: pissa": [{"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}],
    "kasa_config": [{"kasa_config": KasaConfig()}],
    "velora_config": [{"velora_config": VeloraConfig(num_groups=8)}],
    "monteclora_config": [{"monteclora_config": MontecloraConfig()}],
    "use_dora": [{"use_dora": True}],
    "bias": [{"bias": "all"}],
    "lora_bias": [{"lora_bias": True}],
    "modules_to_save": [{"modules_to_save": ["lm_head"]}],
    "alora_invocation_tokens": [{"alora_invocation_tokens": [1, 2]}],
    "use_qalora": [{"use_qalora": True}],
    "use_bdlora": [
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)}
    ],
    "trainable_token_indices": [{"trainable_token_indices": [1, 2]}],
    "layer_replication": [{"layer_replication": [[0, 2], [1, 2]]}],
}


@pytest.fixture(scope="module")
def llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"), smollm2, vocab_size=256)


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    with started(llama) as running:
        yield running


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    """Numbers of adapters, each used once in an engine."""
    return itertools.count(2001)


@pytest.mark.parametrize("kind", KINDS)
def test_each_answers_with_its_own_weights_at_every_number_of_adapters(
    kind: str, engine: Engine, llama: Path, tmp_path: Path
) -> None:
    asked: dict[int, Path | None] = {0: None}
    right = {0: expected(llama, None, 0)}
    first = 100 * list(KINDS).index(kind)
    for number in range(first + 1, first + ADAPTERS_AT_ONCE + 2):  # the last one is one more than are computed together
        asked[number] = folder = tiny.adapter(tmp_path / str(number), llama, number, target_modules=KINDS[kind])
        right[number] = expected(llama, folder, number)
        engine.load(number, folder)
        assert_right(engine.ask(asked), right, f"beside {number - first} adapters, together")
        assert_right(engine.ask({0: None}), right, f"beside {number - first} adapters, alone")
    assert len({tuple(tokens) for tokens, _ in right.values()}) == len(right), (
        "adapters that change nothing test nothing"
    )


def test_adapters_of_all_kinds_share_a_batch(engine: Engine, llama: Path, tmp_path: Path) -> None:
    asked: dict[int, Path | None] = {0: None}
    for number, kind in enumerate([*KINDS, *KINDS], start=1001):
        asked[number] = tiny.adapter(
            tmp_path / str(number), llama, number, target_modules=KINDS[kind], r=4, use_rslora=True
        )
    assert_right(engine.ask(asked), {who: expected(llama, folder, who) for who, folder in asked.items()})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, settings) for kind, several in FORMS.items() for settings in several],
    ids=lambda value: str(value)[:60],
)
def test_what_vllm_does_not_take_is_refused_before_it_is_loaded(
    kind: str, settings: dict[str, Any], engine: Engine, llama: Path, tmp_path: Path, numbers: Iterator[int]
) -> None:
    """And what is not refused answers as with peft."""
    number = next(numbers)
    folder = tiny.adapter(tmp_path / "a", llama, number, **settings)
    if kind == "plain":
        assert check_adapter("a", folder, llama, Paths()) is None
        engine.load(number, folder)
        assert_right(engine.ask({number: folder}), {number: expected(llama, folder, number)})
    else:
        with pytest.raises(ModelError, match=f"adapter a: .*{kind}"):
            check_adapter("a", folder, llama, Paths())
        with pytest.raises((ValueError, RuntimeError)):
            engine.load(number, folder)


def test_an_adapter_on_embeddings_of_another_size_is_refused_before_it_is_loaded(
    engine: Engine, llama: Path, smollm2: Path, tmp_path: Path, numbers: Iterator[int]
) -> None:
    larger = tiny.llama(tmp_path / "larger", smollm2, vocab_size=300)
    for targets in (["lm_head"], ["embed_tokens"]):
        folder = tiny.adapter(tmp_path / targets[0], larger, 0, target_modules=targets)
        with pytest.raises(ModelError, match=rf"adapter a: .*changes \S*{targets[0]} with .*300.* has .*256"):
            check_adapter("a", folder, llama, Paths())
        with pytest.raises(RuntimeError):
            engine.load(next(numbers), folder)
