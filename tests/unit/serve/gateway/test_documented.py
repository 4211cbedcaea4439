"""docs/reference/http-api.md tells all of it."""

from __future__ import annotations

import re
from pathlib import Path

from llm_ray.app.api_service import open_service
from llm_ray.conf.serve import FinetuningApi
from llm_ray.serve.gateway.api import Api
from llm_ray.serve.gateway.metrics import Metrics
from llm_ray.serve.gateway.openapi import ask_for_keys
from llm_ray.serve.gateway.requests import REFUSED

PAGE = (Path(__file__).parents[4] / "docs" / "reference" / "http-api.md").read_text()


def test_every_route(tmp_path: Path) -> None:
    api = Api()
    api.offer(open_service(tmp_path, FinetuningApi()), True)
    described = api.app.openapi()["paths"]
    assert {(method.upper(), path) for path, methods in described.items() for method in methods} == set(
        re.findall(r"^\| `(GET|POST|DELETE) (/[^`]*)`", PAGE, re.MULTILINE)
    )


def test_every_metric() -> None:
    for family in Metrics().registry.collect():
        assert f"| `{family.name}` | {family.type}: {family.documentation} |" in PAGE


def test_every_parameter_that_is_refused() -> None:
    (told,) = re.findall(r"These are refused, each with the reason: (.*?)\. They", PAGE, re.DOTALL)
    assert re.findall(r"`(\w+)`", told) == sorted(REFUSED)


def test_a_key_is_described_where_one_is_needed() -> None:
    app = Api().app
    ask_for_keys(app, True)
    assert app.openapi()["security"] == [{"key": []}]
    assert app.openapi()["paths"]["/health"]["get"]["security"] == []
    ask_for_keys(app, False)
    assert "security" not in app.openapi()
