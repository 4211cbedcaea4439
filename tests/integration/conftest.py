"""Which tests share a process when they run side by side (pytest-xdist)."""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling, Scheduling

HERE = Path(__file__).parent
LONGEST = ("test_engines.py", "ui", "test_quickstart.py", "test_serve_life.py", "test_finetune.py", "test_faults.py")
"""Rooms that begin first: one that begins last is waited for."""


class Rooms(LoadScopeScheduling):
    """Those of a file, or of a folder whose tests share an endpoint: it is deployed once."""

    def _split_scope(self, nodeid: str) -> str:
        path = self.config.rootpath / nodeid.partition("::")[0]
        return room(path) if path.is_relative_to(HERE) else super()._split_scope(nodeid)


def room(path: Path) -> str:
    """The file, or the folder, that a test shares a process with."""
    return path.relative_to(HERE).parts[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = room(item.path) if item.path.is_relative_to(HERE) else ""
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Rooms(config, log)
