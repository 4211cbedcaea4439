"""Print what an image consists of as CycloneDX JSON: Python's packages and the distribution's, each with its package
URL.

docker run --rm llm-ray:latest cat /opt/llm-ray/packages.cdx.json
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from urllib.parse import quote


def component(kind: str, name: str, version: str, **more: str) -> dict[str, Any]:
    purl = f"pkg:{kind}/{quote(name)}@{quote(version, safe=':')}" + "".join(
        f"?{key}={value}" for key, value in more.items()
    )
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


def python() -> Iterator[dict[str, Any]]:
    for package in metadata.distributions():
        yield component("pypi", package.name.lower().replace("_", "-"), package.version)


def system() -> Iterator[dict[str, Any]]:
    distribution = platform.freedesktop_os_release()["ID"]
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\n"],
        check=True,
        capture_output=True,
    )
    for line in listed.stdout.decode().splitlines():
        name, version, architecture = line.split()
        yield component(f"deb/{distribution}", name, version, arch=architecture)


if __name__ == "__main__":
    components = sorted([*python(), *system()], key=lambda part: part["purl"])
    print(
        json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}, indent=1)
    )
