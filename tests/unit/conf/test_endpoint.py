"""What a conf says of an endpoint that runs already, and what it leaves as it is."""

from __future__ import annotations

import pytest

from llm_ray.conf.serve import Endpoint, Limits, ServeConf


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
