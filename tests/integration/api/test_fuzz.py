"""A fuzzer over the endpoint's own description: whatever a client sends, the answer comes soon, is one that is
described, and is no 5xx."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests import fuzzing


@pytest.mark.long
def test_no_request_is_answered_otherwise_than_described(base: str, subtests: pytest.Subtests) -> None:
    for operation in fuzzing.operations(base):
        # That a model is not ready for a moment is what /ready is there to tell.
        checks = [
            check for check in fuzzing.CHECKS if operation.path != "/ready" or check is not fuzzing.NO_SERVER_ERROR
        ]
        fuzzing.fuzz(operation, subtests, _ask_small, checks)


def _ask_small(case: Any) -> None:
    """Have the case ask a model that is there, for a short answer."""
    if isinstance(case.body, dict):
        settings_of_answer = case.body.setdefault("config", {}) if "text" in case.body else case.body
        if isinstance(settings_of_answer, dict):
            settings_of_answer.setdefault("max_new_tokens" if "text" in case.body else "max_tokens", 4)
        if "model" not in (case.path_parameters or {}):
            case.body["model"] = "small"
    if case.method == "POST" and case.path_parameters:
        case.path_parameters["model"] = "small"


def test_the_endpoint_is_well_afterwards(http: httpx.Client) -> None:
    assert http.get("/ready").status_code == 200
    answer = http.post(
        "/small", json={"text": "What is the capital of France?", "config": {"max_new_tokens": 16, "temperature": 0}}
    )
    assert answer.text == "The capital of France is Paris."
