"""Charts and tables hold the figures they are given, and run nothing that is in a name."""

from __future__ import annotations

import math
import re

from llm_ray.progress import duration
from llm_ray.ui import figures


def test_a_curve_has_its_points_and_leaves_out_what_is_no_number() -> None:
    chart = figures.curves("Loss", {"loss": ([1, 2, 3, 4], [2.5, math.nan, 1.25, None]), "none": ([], [])})
    assert re.findall(r"<title>([^<]+)</title>", chart) == ["loss, step 1: 2.5", "loss, step 3: 1.25"]
    assert 'aria-label="Loss: loss: 2.5 at step 1, 1.25 at step 3"' in chart
    assert chart.count("<li>") == 1
    assert figures.curves("Loss", {"loss": ([], [])}) == ""


def test_of_many_points_the_last_is_there_and_the_page_stays_small() -> None:
    steps = list(range(1, 100_001))
    chart = figures.curves("Loss", {"loss": (steps, [1 / step for step in steps])})
    assert "<title>loss, step 100000: 1e-05</title>" in chart
    assert len(chart) < 20_000


def test_one_point_and_a_level_curve_are_drawn() -> None:
    assert "<polyline" in figures.curves("Loss", {"loss": ([1], [0.0])})
    assert "nan" not in figures.curves("Rate", {"rate": ([1, 2], [0.5, 0.5])})


def test_bars() -> None:
    chart = figures.bars("Sequences by tokens", "tokens", [("8–15", 3), ("16–20", 0)])
    assert re.findall(r"<title>([^<]+)</title>", chart) == ["8–15 tokens: 3", "16–20 tokens: 0"]
    assert figures.bars("Nothing", "tokens", []) == ""


def test_what_is_shown_is_text() -> None:
    bad = "<img src=x onerror=a()>"
    shown = [
        figures.table(bad, [bad], [[bad]]),
        figures.pairs({bad: bad}),
        figures.lines(bad, [bad]),
        figures.message(bad),
        figures.curves(bad, {bad: ([1], [1.0])}),
        figures.bars(bad, bad, [(bad, 1)]),
    ]
    assert all("<img" not in part for part in shown)


def test_figures_for_people() -> None:
    assert [figures.number(value) for value in (None, 0.12345, 1e-4, 12_345.6, 12_345)] == [
        "",
        "0.1235",
        "0.0001",
        "12,346",
        "12,345",
    ]
    assert [duration(value) for value in (None, 5, 600, 10_000)] == ["", "5 s", "10 min", "2.8 h"]
