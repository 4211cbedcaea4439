"""LoRA adapters on engine openvino: whoever waits beside them, the base and each adapter answer with their own weights,
as with peft.

    pytest tests/integration/test_lora_openvino.py
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.progress import Silent
from llm_ray.serve.deployments.adapters import check_adapter
from llm_ray.serve.engines.turns import ADMIT_STEPS, MAX_STEPS
from tests.integration import tiny
from tests.integration.lora import TOKENS, Engine, assert_right, expected, started

FORMS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ("q_proj", "v_proj", "o_proj")},
    "mlp": {"target_modules": ("gate_proj", "up_proj", "down_proj"), "use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
    "a layer": {"layers_to_transform": [1], "lora_alpha": 24},
}


@pytest.fixture(scope="module")
def llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"), smollm2)


@pytest.fixture(scope="module")
def graph(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llm_ray.models.convert import openvino_folder

    return openvino_folder(llama, "fp32", tmp_path_factory.mktemp("models"), Silent())


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path | None]:
    """One of each form by its number, and none, which is 0."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        number: tiny.adapter(folder / str(number), llama, number, **settings)
        for number, settings in enumerate(FORMS.values(), start=1)
    }
    return {0: None, **made}


@pytest.fixture(scope="module")
def engine(graph: Path) -> Iterator[Engine]:
    with started(graph, "openvino") as running:
        yield running


@pytest.fixture
def numbers() -> Iterator[int]:
    return itertools.count(100)


def test_each_answers_as_with_peft_in_mixed_load(
    engine: Engine, llama: Path, graph: Path, adapters: dict[int, Path | None]
) -> None:
    for number, folder in adapters.items():
        if folder:
            assert check_adapter("a", folder, graph, Paths()) is None
            engine.load(number, folder)
    right = {number: expected(llama, folder, number) for number, folder in adapters.items()}
    assert len({tuple(tokens) for tokens, _ in right.values()}) == len(right), (
        "adapters that change nothing test nothing"
    )
    assert_right(engine.ask(adapters), right, "together")
    assert_right(engine.ask({0: None}), right, "the base alone, after them")
    # The same prompt, longer than a block of the cache: nobody goes on from what was computed for another.
    same = {number: expected(llama, folder, 47) for number, folder in adapters.items()}
    for times in range(2):
        assert_right(engine.ask(adapters, prompted=47), same, f"the same prompt, {times}")
    # Turns of one step: every answer is paused for others and goes on.
    _set_turns(engine, admit_steps=1, max_steps=1)
    assert_right(engine.ask(adapters), right, "paused")
    _set_turns(engine)


def _set_turns(engine: Engine, admit_steps: int = ADMIT_STEPS, max_steps: int = MAX_STEPS) -> None:
    def change(core: Any) -> None:
        core._turns.admit_steps, core._turns.max_steps = admit_steps, max_steps

    engine.runner.run(engine.client.engine_core._do(change))


def test_a_schema_holds_for_an_adapter_while_others_want_its_turn(
    engine: Engine, adapters: dict[int, Path | None]
) -> None:
    _set_turns(engine, admit_steps=1, max_steps=1)
    asked = {number: adapters[number] for number in (0, 1, 2)}
    shaped = {"structured_outputs": StructuredOutputsParams(choice=["cat"]), "ignore_eos": False, "max_tokens": 8}
    answers = engine.ask(asked, **shaped)
    tokenizer = engine.client.get_tokenizer()
    assert {tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in answers.values()} == {"cat"}
    _set_turns(engine)


def test_a_client_that_leaves_the_queue_holds_nobody_up(
    engine: Engine, llama: Path, adapters: dict[int, Path | None]
) -> None:
    async def leave() -> None:
        waiting = [
            asyncio.create_task(engine._answer(number, folder, [5] * 8, max_tokens=50))
            for number, folder in adapters.items()
        ]
        await asyncio.sleep(0)
        while not engine.client.output_processor.request_states:
            await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    engine.runner.run(leave())
    assert_right(engine.ask({2: adapters[2]}), {2: expected(llama, adapters[2], 2)})
    assert not engine.client.output_processor.request_states


def test_adapters_come_and_go_while_it_serves(
    engine: Engine, llama: Path, tmp_path: Path, numbers: Iterator[int]
) -> None:
    number = next(numbers)
    folder = tiny.adapter(tmp_path / "new", llama, number, target_modules=["k_proj", "down_proj"], r=16)
    engine.load(number, folder)
    assert_right(engine.ask({number: folder}), {number: expected(llama, folder, number)})
    assert engine.runner.run(engine.client.engine_core.list_loras_async()) >= {number}
    engine.runner.run(engine.client.remove_lora(number))
    assert number not in engine.runner.run(engine.client.engine_core.list_loras_async())
    assert_right(engine.ask({0: None}), {0: expected(llama, None, 0)})


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]], ids=str)
def test_what_openvino_would_leave_out_is_refused_before_it_is_loaded(
    targets: list[str], engine: Engine, llama: Path, graph: Path, tmp_path: Path, numbers: Iterator[int]
) -> None:
    folder = tiny.adapter(tmp_path / "a", llama, 0, target_modules=[*targets, "q_proj"])
    assert check_adapter("a", folder, llama, Paths()) is None
    with pytest.raises(ModelError, match=rf"adapter a: .*changes \S*{targets[0]}.*; engine vllm can"):
        check_adapter("a", folder, graph, Paths())
    with pytest.raises(ValueError, match="applies no adapter"):
        engine.load(next(numbers), folder)
    assert len(engine.ask({0: None})[0][0]) == TOKENS  # and goes on
