"""A fuzzer over an endpoint's own description of its operations: whatever a client sends, the answer is described, and
is no 5xx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as openapi

NO_SERVER_ERROR = schemathesis.checks.not_a_server_error
CHECKS = [
    NO_SERVER_ERROR,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
]


def operations(base: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """Those that the endpoint at `base` describes."""
    for found in schemathesis.openapi.from_url(f"{base}/openapi.json", headers=headers or {}).get_all_operations():
        yield found.ok()


def fuzz(
    operation: Any,
    subtests: pytest.Subtests,
    change: Callable[[Any], None],
    checks: list[Any],
    *,
    valid: int = 12,
    invalid: int = 20,
    headers: dict[str, str] | None = None,
) -> None:
    """Send requests that the description allows, and, where there is a body, requests that it does not. `change` makes a
    case one that gets past the first check, such as for a name that exists."""
    modes = [(GenerationMode.POSITIVE, valid)]
    if operation.body:  # without one nothing can be invalid: any text can be a name
        modes.append((GenerationMode.NEGATIVE, invalid))
    for mode, examples in modes:
        with subtests.test(operation.label, mode=mode.value):
            _send(operation.as_strategy(generation_mode=mode), examples, change, checks, headers)


def _send(
    cases: Any, examples: int, change: Callable[[Any], None], checks: list[Any], headers: dict[str, str] | None
) -> None:
    @given(case=cases)
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def send(case: Any) -> None:
        change(case)
        case.call_and_validate(timeout=60, checks=checks, headers=headers)

    send()
