"""A fuzzer over the endpoint's own description: whatever a client sends, the answer comes soon, is one that is
described, and is no 5xx."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as openapi

CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
]


@pytest.mark.long
def test_no_request_is_answered_otherwise_than_described(base: str, subtests: pytest.Subtests) -> None:
    for found in schemathesis.openapi.from_url(f"{base}/openapi.json").get_all_operations():
        operation = found.ok()
        modes = [(GenerationMode.POSITIVE, 12)]
        if operation.body:  # else there is nothing in it that could be wrong: any text can be a model's name
            modes.append((GenerationMode.NEGATIVE, 20))
        for mode, examples in modes:
            with subtests.test(operation.label, mode=mode.value):
                # That a model is not ready for a moment is what /ready is there to tell.
                allowed = [
                    check
                    for check in CHECKS
                    if operation.path != "/ready" or check is not schemathesis.checks.not_a_server_error
                ]
                _fuzz(operation.as_strategy(generation_mode=mode), examples, allowed)


def _fuzz(cases: Any, examples: int, checks: list[Any]) -> None:
    @given(case=cases)
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):  # to a model that is there, and for a short answer
            settings_of_answer = case.body.setdefault("config", {}) if "text" in case.body else case.body
            if isinstance(settings_of_answer, dict):
                settings_of_answer.setdefault("max_new_tokens" if "text" in case.body else "max_tokens", 4)
            if "model" not in (case.path_parameters or {}):
                case.body["model"] = "small"
        if case.method == "POST" and case.path_parameters:
            case.path_parameters["model"] = "small"
        case.call_and_validate(timeout=60, checks=checks)

    ask()


def test_the_endpoint_is_well_afterwards(http: httpx.Client) -> None:
    assert http.get("/ready").status_code == 200
    answer = http.post(
        "/small", json={"text": "What is the capital of France?", "config": {"max_new_tokens": 16, "temperature": 0}}
    )
    assert answer.text == "The capital of France is Paris."
