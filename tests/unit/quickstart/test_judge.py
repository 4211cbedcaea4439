"""What counts as a right answer."""

from __future__ import annotations

import pytest

from llm_ray.quickstart.judge import is_right


@pytest.mark.parametrize(
    ("answer", "expect"),
    [
        ("You can return an Otter within 47 days of delivery.", ["47 days"]),
        ("47 DAYS!", ["47 days"]),
        ("Within 47\u00a0days.", ["47 days"]),
        ("A 47-day return period.", ["47 days|47 day"]),
        ("It costs €213.", ["213 euros|€213"]),
        ("22% off", ["22 percent|22 %"]),
        ("From 7:30 to 16:15.", ["7:30", "16:15"]),
        ("Write to paddle@tarnbrook.example.", ["paddle@tarnbrook.example"]),
        ("The pre‑filter is clogged; it doesn't hurt.", ["pre-filter|prefilter"]),
        ("Error E41 means that the pre-filter is clogged.", ["pre-filter"]),
        ("It cleans 2.3 litres a minute", ["2.3"]),
    ],
)
def test_right(answer: str, expect: list[str]) -> None:
    assert is_right(answer, expect)


@pytest.mark.parametrize(
    ("answer", "expect"),
    [
        ("", ["47 days"]),
        ("You have 30 days.", ["47 days"]),
        ("You have 147 days.", ["47 days"]),
        ("You have 47 weeks.", ["47 days"]),
        ("You have 30 or 47 days.", ["47 days"]),  # names another number: a guess
        ("47.5 days", ["47 days"]),
        ("It is not 47 days.", ["47 days"]),
        ("From 7:30 to 17:00.", ["7:30", "16:15"]),
        ("From 7:30.", ["7:30", "16:15"]),
        ("Write to paddle@tarnbrook.example.com", ["paddle@tarnbrook.example"]),
        ("Write to help@tarnbrook.com or paddle@tarnbrook.example", ["paddle@tarnbrook.example"]),
        ("12.3 litres", ["2.3"]),
        ("The handler is open.", ["handle"]),
        ("The tank isn't empty.", ["tank", "empty"]),
    ],
)
def test_wrong(answer: str, expect: list[str]) -> None:
    assert not is_right(answer, expect)
