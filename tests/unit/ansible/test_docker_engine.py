"""docker_engine where it cannot be run here: what is written for Docker's own repository, and names on every
distribution."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import yaml

ROLE = Path(__file__).parents[3] / "roles/docker_engine"


@pytest.mark.parametrize(
    ("distribution", "release", "uri"),
    [
        ("Debian", "bookworm", "https://mirror.example/docker/debian"),
        ("Ubuntu", "jammy", "https://mirror.example/docker/ubuntu"),
        ("Ubuntu", "noble", "https://mirror.example/docker/ubuntu"),
    ],
)
@pytest.mark.parametrize(("there", "key"), [(False, "llm-ray-docker.asc"), (True, "docker.asc")])
def test_dockers_repository_is_named_for_the_distribution(
    distribution: str, release: str, uri: str, there: bool, key: str
) -> None:
    """By the key of Docker's own instructions where that is there: apt refuses two for one repository."""
    facts = {"distribution": distribution, "distribution_release": release}
    template = jinja2.Template((ROLE / "templates/docker.sources.j2").read_text(), undefined=jinja2.StrictUndefined)
    own = {
        "docker_engine_repository": "https://mirror.example/docker",
        "__docker_engine_key": {"stat": {"exists": there}},
    }
    text = template.render(own, ansible_managed="", ansible_facts=facts)
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert fields == {
        "Types": "deb", "URIs": uri, "Suites": release, "Components": "stable", "Signed-By": f"/etc/apt/keyrings/{key}",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["debian", "ubuntu", "redhat"])
def test_no_provider_conflicts_with_itself(name: str) -> None:
    names = yaml.safe_load((ROLE / f"vars/{name}.yml").read_text())
    packages, conflicts = names["__docker_engine_packages"], names["__docker_engine_conflicts"]
    assert packages.keys() == conflicts.keys()
    for provider in packages:
        assert not set(packages[provider]) & set(conflicts[provider])
    if "distribution" in packages:  # each refuses the other's
        assert packages["distribution"][0] in conflicts["docker_ce"]
        assert packages["docker_ce"][0] in conflicts["distribution"]
