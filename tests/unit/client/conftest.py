"""The server, as new for each test, and no key of whoever runs the tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.unit.client.server import Server, client_server


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with client_server() as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    for variable in ("LLM_RAY_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    vars(running).update(vars(Server(running.base)))
    return running


@pytest.fixture
def unused() -> Iterator[int]:
    """A port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
