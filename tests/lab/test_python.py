"""A standalone Python, brought by uv, for distributions whose own is too old: from a list of builds of the host's own,
since the lab is offline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import cluster as lab_cluster
from tests.lab.cluster import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.long]

# A build laid out as those that uv knows: the distribution's own files. uv's settings on the host name the list.
_BUILD = """
set -e
apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv > /dev/null
mkdir -p /root/made/python/bin /root/made/python/lib /etc/uv
cp /usr/bin/python3.11 /root/made/python/bin/ && ln -s python3.11 /root/made/python/bin/python3
cp -rL /usr/lib/python3.11 /root/made/python/lib/
cd /root/made && tar czf python.tar.gz python
cat > list.json <<END
{"cpython-3.11.2-linux-x86_64-gnu": {"name": "cpython", "arch": {"family": "x86_64", "variant": null}, "os": "linux", "libc": "gnu",
 "major": 3, "minor": 11, "patch": 2, "prerelease": "", "url": "file:///root/made/python.tar.gz",
 "sha256": "$(sha256sum python.tar.gz | cut -d' ' -f1)", "variant": null, "build": "20230101"}}
END
echo 'python-downloads-json-url = "/root/made/list.json"' > /etc/uv/uv.toml
"""
_PYTHON = "/opt/llm-ray/python/cpython-3.11.2-linux-x86_64-gnu"


@pytest.fixture(scope="module")
def host(lab_ready: None) -> Iterator[Cluster]:
    with lab_cluster.cluster({"ray_head": ["solo"], "ray_workers": []}, python_runtime_python="uv:3.11.2") as made:
        made.head.ssh(_BUILD, timeout=300)
        yield made


def test_a_node_runs_from_it(host: Cluster) -> None:
    host.play("site.yml", "--tags", "preflight,host_base,python_runtime,nfs_client,ray_node")
    host.wait_for_nodes([host.head])
    assert host.head.ssh("readlink -f /opt/llm-ray/current/bin/python").stdout.startswith(_PYTHON)
    assert host.play("site.yml", "--tags", "preflight,python_runtime,ray_node").changes() == []
