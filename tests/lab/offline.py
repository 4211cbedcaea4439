"""What labs without the internet have: a bundle's folder that is kept between runs, hosts with the packages that a
bundle lists, a cut cable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.lab.cluster import Cluster
from tests.lab.hosts import cache, run
from tests.lab.wheels import ROOT, wheels
from tests.unit.ansible.conftest import load


def folder(name: str) -> Path:
    """A bundle; its wheels are those that the whole lab has."""
    made = cache() / name
    (made / "wheels").mkdir(parents=True, exist_ok=True)
    for file in wheels().iterdir():
        to = made / "wheels" / file.name
        if not to.exists() or not to.samefile(file):
            to.unlink(missing_ok=True)
            os.link(file, to)
    for file in (made / "wheels").iterdir():
        if not (wheels() / file.name).exists():
            file.unlink()
    return made


def packages(**wanted: Any) -> tuple[str, ...]:
    """Those of Debian that a bundle lists for such a cluster."""
    return tuple(
        load("roles/bundle/filter_plugins/bundle.py").bundle_packages(str(ROOT / "roles"), wanted)["debian-12"]
    )


def cut(cluster: Cluster) -> None:
    """The hosts reach each other and this machine, and nothing else."""
    bridge = cluster.lab.net.bridge
    run("nft", f"add chain ip {bridge} cut {{ type filter hook forward priority -10; }}")
    run("nft", f"add rule ip {bridge} cut iifname {bridge} oifname != {bridge} drop")
