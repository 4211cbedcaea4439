"""Which tests share a process when they run side by side (pytest-xdist)."""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling, Scheduling

HERE = Path(__file__).parent


class Rooms(LoadScopeScheduling):
    """Those of a file, or of a folder whose tests share an endpoint: it is deployed once."""

    def _split_scope(self, nodeid: str) -> str:
        path = self.config.rootpath / nodeid.partition("::")[0]
        return path.relative_to(HERE).parts[0] if path.is_relative_to(HERE) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Rooms(config, log)
