"""What a cluster is to serve is kept as its confs, and read again when its head has started anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ray.conf.serve import ServeConf
from llm_ray.errors import ServeError
from llm_ray.serve.declared import declared, declared_file, forget, remember


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))
    return tmp_path


def _conf(port: int = 8000, **models: str) -> ServeConf:
    return ServeConf.model_validate({"endpoint": {"port": port}, "models": {name: {"model": model} for name, model in models.items()}})


def test_each_model_is_kept_as_the_last_conf_that_deployed_it_said() -> None:
    assert declared() == []
    remember(_conf(a="one", b="two"), ["a", "b"])
    remember(_conf(port=9000, b="three", c="four"), ["b"])
    kept = {next(iter(conf.models)): conf for conf in declared()}
    assert {name: conf.models[name].model for name, conf in kept.items()} == {"a": "one", "b": "three"}
    assert {conf.endpoint.port for conf in kept.values()} == {9000}
    assert {conf.runtime.mode for conf in kept.values()} == {"cluster"}


def test_what_is_stopped_does_not_come_back() -> None:
    forget()
    assert not declared_file().exists()
    remember(_conf(a="one", b="two"), ["a", "b"])
    forget(["a"])
    assert [next(iter(conf.models)) for conf in declared()] == ["b"]
    forget()
    assert declared() == []


@pytest.mark.parametrize("text", ["{", '{"models": {"a": {"paths": {}, "model": {"model": "x", "colour": 1}}}, "endpoint": {}}'])
def test_a_file_that_cannot_be_read_is_told(home: Path, text: str) -> None:
    (home / "serve").mkdir()
    declared_file().write_text(text)
    with pytest.raises(ServeError, match=r"declared\.json.*deploy"):
        declared()
