"""The alert rules by promtool's own tests, on a host with nothing but Debian's package prometheus; whether they are met
on a real cluster is in test_monitoring.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import Host, lab
from tests.lab.wheels import ROOT

pytestmark = pytest.mark.lab

_RULES = ROOT / "roles/monitoring/files/rules.yml"
_TESTS = ROOT / "tests/lab/rules_test.yml"


@pytest.fixture(scope="module")
def host(lab_ready: None) -> Iterator[Host]:
    with lab(Path(tempfile.mkdtemp(prefix="llm-ray-lab-"))) as made:
        (host,) = made.add("rules")
        host.ssh("apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus", timeout=300)
        host.ssh("mkdir -p /bundle/roles/monitoring/files /bundle/tests/lab")
        for file in (_RULES, _TESTS):
            host.ssh(f"cat > /bundle/{file.relative_to(ROOT)} <<'END'\n{file.read_text()}\nEND")
        yield host


def test_the_rules_do_what_they_say(host: Host) -> None:
    said = host.ssh("promtool test rules /bundle/tests/lab/rules_test.yml").stdout
    assert "SUCCESS" in said


@pytest.mark.parametrize(
    "change", ["s/< 0.10/< 0.01/", "s/for: 2m/for: 1h/", "s/> 0.05/> 0.5/", "s/severity: critical/severity: warning/"]
)
def test_a_rule_that_is_wrong_is_found(host: Host, change: str) -> None:
    host.ssh(f"cp -r /bundle /wrong; sed -i '{change}' /wrong/roles/monitoring/files/rules.yml")
    try:
        assert host.ssh("promtool test rules /wrong/tests/lab/rules_test.yml", check=False).returncode != 0
    finally:
        host.ssh("rm -r /wrong")
