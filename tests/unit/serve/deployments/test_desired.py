"""What a cluster is to serve is kept as its confs, and read again when its head has started anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ray.conf.serve import ServeConf
from llm_ray.errors import ServeError
from llm_ray.serve.deployments.desired import desired_confs, desired_file, forget, remember


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return desired_file(tmp_path)


def _conf(port: int = 8000, **models: str) -> ServeConf:
    return ServeConf.model_validate(
        {"endpoint": {"port": port}, "models": {name: {"model": model} for name, model in models.items()}}
    )


def test_each_model_is_kept_as_the_last_conf_that_deployed_it_said(file: Path) -> None:
    assert desired_confs(file) == []
    remember(file, _conf(a="one", b="two"), ["a", "b"])
    remember(file, _conf(port=9000, b="three", c="four"), ["b"])
    kept = {next(iter(conf.models)): conf for conf in desired_confs(file)}
    assert {name: conf.models[name].model for name, conf in kept.items()} == {"a": "one", "b": "three"}
    assert {conf.endpoint.port for conf in kept.values()} == {9000}
    assert {conf.runtime.mode for conf in kept.values()} == {"cluster"}


def test_what_is_stopped_does_not_come_back(file: Path) -> None:
    forget(file)
    assert not file.exists()
    remember(file, _conf(a="one", b="two"), ["a", "b"])
    forget(file, ["a"])
    assert [next(iter(conf.models)) for conf in desired_confs(file)] == ["b"]
    forget(file)
    assert desired_confs(file) == []


def test_an_adapter_that_is_taken_away_does_not_come_back(file: Path) -> None:
    conf = ServeConf.model_validate({"models": {"a": {"model": "one", "adapters": {"x": "run-x", "y": "run-y"}}}})
    remember(file, conf, ["a"])
    forget(file, ["x"])
    assert desired_confs(file)[0].models["a"].adapters == {"y": "run-y"}


def test_what_an_earlier_version_kept_comes_back_until_it_is_stopped(file: Path) -> None:
    remember(file, _conf(a="one", b="two"), ["a", "b"])
    file.rename(earlier := file.with_name("declared.json"))
    assert [next(iter(conf.models)) for conf in desired_confs(file)] == ["a", "b"]
    forget(file, ["a"])
    assert [next(iter(conf.models)) for conf in desired_confs(file)] == ["b"]
    assert not earlier.exists()


@pytest.mark.parametrize(
    "text", ["{", '{"models": {"a": {"paths": {}, "model": {"model": "x", "colour": 1}}}, "endpoint": {}}']
)
def test_a_file_that_cannot_be_read_is_told(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ServeError, match=r"desired\.json.*deploy"):
        desired_confs(file)
