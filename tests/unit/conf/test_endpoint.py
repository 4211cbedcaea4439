"""What a conf says of an endpoint that runs already, and what it leaves as it is."""

from __future__ import annotations

import pytest

from llm_ray.conf.serve import MODEL_NAME, Endpoint, Limits, ServeConf


def test_what_is_not_said_stays_as_it_runs() -> None:
    running = Endpoint(port=9000, api_keys="on", cors_origins=("https://a",), limits=Limits(concurrent=3))
    assert Endpoint().over(running) == running
    said = Endpoint(api_keys="off", limits=Limits())
    assert said.over(running) == Endpoint(port=9000, api_keys="off", cors_origins=("https://a",))
    assert Endpoint().over(said.over(running)).api_keys == "off"


def test_an_endpoint_that_needs_keys_goes_on_needing_them() -> None:
    beyond = Endpoint(host="0.0.0.0")  # noqa: S104
    assert Endpoint(max_body_mib=1).over(beyond).needs_keys


def test_names_that_would_be_one_file_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"models\.a--b: its name is too similar to that of models\.a/b"):
        ServeConf.model_validate({"models": {name: {"model": "m"} for name in ("a/b", "a--b")}})


def test_strangers_never_get_the_fine_tuning_api() -> None:
    on = {"finetuning": {"enabled": True}}
    assert not Endpoint().finetuning.enabled
    assert Endpoint.model_validate(on).too_open == ""
    assert Endpoint.model_validate(on | {"host": "0.0.0.0"}).too_open == ""  # noqa: S104  # keys are needed there
    with pytest.raises(ValueError, match=r"endpoint\.finetuning\.enabled needs API keys on 0\.0\.0\.0"):
        Endpoint.model_validate(on | {"host": "0.0.0.0", "api_keys": "off"})  # noqa: S104
    open_already = Endpoint(host="0.0.0.0", api_keys="off")  # noqa: S104
    assert Endpoint.model_validate(on).over(open_already).too_open


def test_the_fine_tuning_api_is_for_one_machine() -> None:
    given = {"models": {"a": {"model": "m"}}, "endpoint": {"finetuning": {"enabled": True}}}
    assert ServeConf.model_validate(given).endpoint.finetuning.enabled
    with pytest.raises(ValueError, match=r"runtime\.mode is cluster: leave it out"):
        ServeConf.model_validate(given | {"runtime": {"mode": "cluster"}})


@pytest.mark.parametrize("name", ["ft:base:bot:0a1b", "ft:team/pair::0a1b", "base", "team/pair"])
def test_names_of_models(name: str) -> None:
    assert MODEL_NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["ft:base", "a:b", "ft:base:bot:", "ft:../x:bot:0a", "ft:a/b/c:bot:0a", "a/b/c", "ft:"]
)
def test_what_is_no_name_of_a_model(name: str) -> None:
    assert not MODEL_NAME.fullmatch(name)
