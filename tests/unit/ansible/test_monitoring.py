"""Dashboards and alert rules: whole, tested, and about metrics that the gateway exports. Ray's and the hosts' metrics:
tests/lab."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_ray.serve.gateway.metrics import Metrics

ROOT = Path(__file__).parents[3]
FILES = ROOT / "roles/monitoring/files"
DASHBOARDS = sorted((FILES / "dashboards").glob("*.json"))


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FILES / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """Every query of the rules and the dashboards."""
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    return [rule["expr"] for rule in alerts()] + [
        target["expr"] for panel in panels for target in panel.get("targets", [])
    ]


def metrics(prefix: str) -> set[str]:
    """Names of metrics in them."""
    return {
        name
        for expression in expressions()
        for name in re.findall(rf"\b{prefix}\w+", re.sub(r'"[^"]*"', "", expression))
    }


def test_the_gateway_exports_what_is_asked_of_it() -> None:
    ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    exported = {family.name + end for family in Metrics().registry.collect() for end in ends[family.type]}
    asked = metrics("llm_ray_")
    assert len(asked) > 8
    assert asked - exported == set()


def test_every_alert_says_what_to_do_and_has_a_test() -> None:
    tests = yaml.safe_load((ROOT / "tests/lab/rules_test.yml").read_text())["tests"]
    fired = {test["alertname"] for each in tests for test in each["alert_rule_test"] if test["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alerts()}
    for rule in alerts():
        assert {"summary", "action"} <= set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_imported(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == f"llm-ray-{path.stem}"
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names[0] == "datasource"  # asked for at import: no data source of ours is written into the file
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= set(names), panel["title"]


def test_no_two_panels_of_a_dashboard_overlap() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, f"{path.stem}: {panel['title']}"
            assert at["x"] + at["w"] <= 24, f"{path.stem}: {panel['title']}"
            taken |= cells
