"""What doctor says of ports and proxies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_ray.cli.ui import ui
from llm_ray.conf.serve import Endpoint
from llm_ray.doctor import machine, network


def _held(name: str, by: str = "nginx (process 812)", pid: int = 812) -> dict[str, Any]:
    return {"name": name, "port": network.PORTS[name], "by": by, "pid": pid}


@pytest.mark.parametrize(
    ("held", "ours", "level", "text", "fix"),
    [
        (_held("endpoint"), set(), "problem", "held by nginx (process 812)", "--port 8001, or end it: kill 812"),
        (_held("endpoint", "", 0), set(), "problem", "a process of another user", "fuser -k 8000/tcp"),
        (_held("endpoint"), {812}, "ok", "held by llm-ray itself", ""),
        (_held("endpoint", "ray::ProxyActor (process 5)", 5), set(), "note", "not this user's local one", "--address auto"),
        (_held("page"), set(), "problem", "held by nginx", "llm-ray ui --port 7861"),
        (_held("Ray's GCS", "redis-server (process 7)", 7), set(), "note", "only if this host becomes a cluster's head", "kill 7"),
        (_held("Ray's GCS", "gcs_server (process 7)", 7), set(), "ok", "held by a Ray", ""),
    ],
)  # fmt: skip
def test_a_port_that_is_held(held: dict[str, Any], ours: set[int], level: str, text: str, fix: str) -> None:
    found, free = network.ports([held], ours)
    assert (found.level, free.level) == (level, "ok")
    assert text in found.text
    assert fix in found.fix
    assert bool(found.fix) == (level != "ok")
    assert held["port"] not in free.values["free"]
    assert len(free.values["free"]) == len(network.PORTS) - 1


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, "ok"),
        ({"no_proxy": "localhost"}, "ok"),
        ({"http_proxy": ""}, "ok"),
        ({"http_proxy": "http://proxy:3128"}, "problem"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}, "problem"),
        ({"all_proxy": "socks5://proxy", "NO_PROXY": "localhost,127.0.0.1"}, "ok"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, "ok"),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "localhost,127.0.0.1", "no_proxy": "example.org"}, "problem"),
    ],
)
def test_proxies(environ: dict[str, str], level: str) -> None:
    found = network.proxies(environ)
    assert found.level == level
    assert ("127.0.0.1,localhost" in found.fix) == (level == "problem")


def test_ports_are_the_defaults_of_what_uses_them() -> None:
    assert Endpoint.model_fields["port"].default == network.ENDPOINT
    (page,) = (option.default for option in ui.params if option.name == "port")
    assert page == network.PAGE
    role = yaml.safe_load((Path(__file__).parents[3] / "roles/ray_node/defaults/main.yml").read_text())
    names = ("port", "dashboard_port", "client_port", "dashboard_agent_port")
    assert [*network.HEAD.values()] == [role[f"ray_node_{name}"] for name in names]
    assert role["ray_node_object_store_gib"] == machine.CLUSTER_STORE_GIB
