"""docker/compose.yaml: one machine, whose Ray listens on loopback alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llm_ray.cluster import LOOPBACK

_ROOT = Path(__file__).parents[2]


def test_ray_is_told_that_loopback_is_meant() -> None:
    head: dict[str, Any] = yaml.safe_load((_ROOT / "docker/compose.yaml").read_text())["services"]["head"]
    assert "--node-ip-address=127.0.0.1" in head["command"].split()
    assert head["environment"].items() >= LOOPBACK.items()
    assert head["network_mode"] == "host"  # published ports would go around the machine's firewall
