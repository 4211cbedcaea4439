"""reset.yml: wants the name, takes everything but data, and leaves hosts that site.yml can start from. The last test of
the lab."""

from __future__ import annotations

import pytest

from tests.lab.cluster import Cluster
from tests.lab.test_nodes import _PARTS

pytestmark = [pytest.mark.lab, pytest.mark.long]


def test_reset_and_site_again(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    cluster.head.ssh("echo precious > /srv/llm-ray/models/kept")
    for wrong in ([], ["-e", "confirm=llm-rya"], ["-e", "confrim=llm-ray"]):
        refused = cluster.play("reset.yml", *wrong, ok=False)
        assert refused.code != 0
        assert "confirm" in refused.output
        assert "PLAY [Stop Ray]" not in refused.output
    cluster.play("reset.yml", "-e", "confirm=llm-ray")
    for host in cluster.nodes:
        assert host.ssh(_PARTS, check=False).stdout == ""
        assert host.ssh("pgrep -u 1200; getent passwd ray; nft list table inet llm_ray", check=False).stdout == ""
        assert "llm-ray" not in host.ssh("cat /etc/hosts").stdout
        assert host.ssh("find /etc /usr/local -name '*llm-ray*'").stdout == ""
    assert cluster.head.ssh("cat /srv/llm-ray/models/kept").stdout == "precious\n"
    assert cluster.play("reset.yml", "-e", "confirm=llm-ray").changes() == []
    cluster.play("site.yml")
    cluster.wait_for_nodes(cluster.nodes)
    assert cluster.head.ssh("cat /srv/llm-ray/models/kept").stdout == "precious\n"
    cluster.play("reset.yml", "-e", "confirm=llm-ray", "-e", "remove_data=true")
    assert cluster.head.ssh("ls /srv/llm-ray").stdout == ""
