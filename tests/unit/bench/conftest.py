"""The server of the client's tests."""

from tests.unit.client.conftest import running, server, unused

__all__ = ["running", "server", "unused"]
