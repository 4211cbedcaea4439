"""Each engine describes itself once; what is derived from that, and that its core is there."""

from __future__ import annotations

import importlib
from typing import get_args

import pytest
from pydantic import ValidationError

from llm_ray.conf.engines import DEFAULT, ENGINES, EngineName, engines_with
from llm_ray.conf.serve import ModelServing
from llm_ray.serve.engines.thread import Core


def test_the_names_are_those_of_the_table() -> None:
    assert get_args(EngineName) == tuple(ENGINES)
    assert ENGINES[DEFAULT].options_of_vllm


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
