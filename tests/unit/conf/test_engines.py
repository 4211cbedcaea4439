"""Each engine describes itself once; what is derived from that, and that its core is there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from llm_ray.conf.engines import ENGINES, FASTEST, WIDEST, EngineChoice, EngineName, able, engines_with, forms
from llm_ray.conf.serve import ModelServing
from llm_ray.serve.engines.thread import Core
from llm_ray.serve.models import ServedModel
from llm_ray.serve.replica.deployment import start_environment


def test_the_names_are_those_of_the_table() -> None:
    assert get_args(EngineName) == tuple(ENGINES)
    assert get_args(EngineChoice) == ("auto", *ENGINES)
    assert ENGINES[WIDEST].options_of_vllm
    assert ENGINES[FASTEST].converts


@pytest.mark.parametrize(("name", "environment"), [("vllm", {}), ("openvino", {"LD_PRELOAD": ""})])
def test_a_replica_starts_with_a_malloc_that_its_engine_bears(name: EngineName, environment: dict[str, str]) -> None:
    model = ServedModel("m", Path("/m"), engine=name)
    assert start_environment(model) == environment


def test_auto_can_do_what_any_of_them_can() -> None:
    assert all(able("auto", trait) for trait in ("adapters", "converts", "compiles"))
    assert not able("vllm", "converts")
    assert forms("auto") == ("auto",)
    assert forms("openvino")[0] == "int8"


def test_auto_cannot_do_at_once_what_no_engine_does() -> None:
    with pytest.raises(ValidationError, match="weights needs engine openvino, but compile needs engine vllm"):
        ModelServing.model_validate({"model": "m", "weights": "int8", "compile": True})
    assert ModelServing.model_validate({"model": "m", "weights": "int8", "adapters": {"a": "run"}}).engine == "auto"


@pytest.mark.parametrize("name", ENGINES)
def test_its_core_is_there(name: EngineName) -> None:
    module, core = ENGINES[name].core.split(":")
    found = getattr(importlib.import_module(module), core)
    wanted = {method for method in vars(Core) if not method.startswith("_") and callable(getattr(Core, method))}
    assert wanted | {"refusal"} <= {method for method in dir(found) if callable(getattr(found, method))}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("setting", "trait"),
    [({"adapters": {"a": "run"}}, "adapters"), ({"weights": "int8"}, "converts"), ({"compile": True}, "compiles")],
)
def test_what_it_does_not_take_is_refused_with_what_does(
    name: EngineName, setting: dict[str, object], trait: str
) -> None:
    if getattr(ENGINES[name], trait):
        assert ModelServing.model_validate({"model": "m", "engine": name, **setting}).engine == name
        return
    with pytest.raises(ValidationError, match=rf"needs? engine {engines_with(trait)}"):
        ModelServing.model_validate({"model": "m", "engine": name, **setting})
