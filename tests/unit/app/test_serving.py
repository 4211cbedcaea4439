"""A run beside its base: what of the two has to be deployed, and how."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # fails once Ansible's code, of other tests, has put its own sys.intern in place

from llm_ray.app.serving import ModelStatus, ServedModel, pair
from llm_ray.errors import RunError
from llm_ray.serve.models import Adapter
from tests.integration.tiny import adapter, llama
from tests.runs import conf_of, opened_run


def _served(name: str, home: Path, **more: Any) -> dict[str, ModelStatus]:
    model = replace(ServedModel(name, home / "models" / "base"), **more)
    return {name: ModelStatus("RUNNING", True, 1, 1, "", "", {}, {}, model)}


@pytest.fixture
def home(tmp_path: Path, smollm2: Path) -> Path:
    """With the model `base`, and on it `tuned`, a run whose model is its base once more."""
    (tmp_path / "models").mkdir()
    llama(tmp_path / "models" / "base", smollm2, hidden_size=16)
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}\n')
    conf = conf_of(tmp_path, "tuned", rows)
    with opened_run(conf, force=False):
        pass
    return tmp_path


def _export(home: Path, smollm2: Path, **settings: Any) -> None:
    output = home / "runs" / "tuned" / "output"
    llama(output, smollm2, hidden_size=16)
    adapter(output / "adapter", home / "models" / "base", 0, **settings)


def _deployed(home: Path, running: dict[str, ModelStatus]) -> dict[str, tuple[str, dict[str, str]]] | None:
    found = pair("tuned", home, running)
    assert (found.run, found.base) == ("tuned", "base")
    return found.conf and {name: (model.model, model.adapters) for name, model in found.conf.models.items()}


def test_neither_is_served_and_the_run_is_an_adapter_on_its_base(home: Path, smollm2: Path) -> None:
    _export(home, smollm2)
    assert _deployed(home, {}) == {"base": ("base", {"tuned": "tuned"})}


def test_what_no_adapter_can_be_is_a_model_of_its_own(home: Path, smollm2: Path) -> None:
    _export(home, smollm2)
    file = home / "runs" / "tuned" / "output" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    assert _deployed(home, {}) == {"base": ("base", {}), "tuned": ("tuned", {})}


def test_what_is_served_already_stays_as_it_is(home: Path, smollm2: Path) -> None:
    _export(home, smollm2)
    assert _deployed(home, _served("base", home)) == {"tuned": ("tuned", {})}
    assert _deployed(home, _served("tuned", home)) == {"base": ("base", {})}
    assert _deployed(home, _served("base", home) | _served("tuned", home)) is None
    assert _deployed(home, _served("base", home, adapters={"tuned": Adapter("/a", "1")})) is None


def test_a_run_without_a_model_is_told(home: Path) -> None:
    with pytest.raises(RunError, match="the run tuned has no model yet"):
        pair("tuned", home, {})
