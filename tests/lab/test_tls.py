"""Ray's nodes speak to each other under TLS, with certificates of an authority of one's own."""

from __future__ import annotations

import pytest
import yaml

from tests.lab.cluster import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.long]

_FOLDER = "/etc/llm-ray-tls"
_AUTHORITY = """
umask 077; mkdir -p /root/authority; cd /root/authority
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout key.pem -out ca.pem 2>/dev/null
"""
_CERTIFICATE = """
cd /root/authority
openssl req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr 2>/dev/null
echo 'subjectAltName=IP:{address},IP:127.0.0.1,DNS:localhost' > {name}.ext
openssl x509 -req -in {name}.csr -CA ca.pem -CAkey key.pem -CAcreateserial -days 2 -extfile {name}.ext -out {name}.pem 2>/dev/null
"""


def _certify(cluster: Cluster) -> None:
    """Give every node a certificate, its key, and the authority's certificate."""
    cluster.head.ssh(_AUTHORITY)
    for host in cluster.nodes:
        cluster.head.ssh(_CERTIFICATE.format(name=host.name, address=host.address))
        host.ssh(f"install -d -o ray -g ray -m 0700 {_FOLDER}")
        for part, made in (("certificate", f"{host.name}.pem"), ("key", f"{host.name}.key"), ("ca", "ca.pem")):
            pem = cluster.head.ssh(f"cat /root/authority/{made}").stdout
            host.ssh(f"install -o ray -g ray -m 0400 /dev/stdin {_FOLDER}/{part}.pem <<'END'\n{pem}END")


def test_nodes_speak_under_tls_and_to_nobody_without(cluster: Cluster) -> None:
    cluster.wait_for_nodes(cluster.nodes)
    _certify(cluster)
    settings = cluster.lab.folder / "inventory/group_vars/all/tls.yml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(
        yaml.safe_dump({f"ray_node_tls_{part}": f"{_FOLDER}/{part}.pem" for part in ("certificate", "key", "ca")})
    )
    try:
        cluster.play("site.yml")
        cluster.wait_for_nodes(cluster.nodes)
        cluster.play("validate.yml")
        assert cluster.play("site.yml").changes() == []
        status = (
            "set -a; . /etc/llm-ray/ray.env; {} timeout 60 /opt/llm-ray/current/bin/ray status >/dev/null 2>&1; echo $?"
        )
        said = [cluster.workers[0].ssh(status.format(f"RAY_USE_TLS={used}")).stdout.strip() for used in (1, 0)]
        assert said[0] == "0"
        assert said[1] != "0"
    finally:
        settings.unlink()
        cluster.play("site.yml")
        for host in cluster.nodes:
            host.ssh(f"rm -r {_FOLDER}")
        cluster.wait_for_nodes(cluster.nodes)
