"""The Python packages that the lab's hosts install: an offline bundle, made once, kept, and bound into every host
read-only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.lab.hosts import cache

ROOT = Path(__file__).parents[2]


def wheels(profile: str = "stock") -> Path:
    """The bundle's folder. Raises CalledProcessError where a package cannot be had; what is missing is on stderr
    then."""
    folder = cache() / ("wheels" if profile == "stock" else f"wheels-{profile}")
    subprocess.run([sys.executable, str(ROOT / "scripts/bundle"), str(folder), "--profile", profile], check=True)
    return folder
