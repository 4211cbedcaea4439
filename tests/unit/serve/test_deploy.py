"""What is said when a model cannot be deployed; the deployment itself is tests/integration/test_serve.py."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_ray.cli.main import cli
from llm_ray.errors import ServeError
from llm_ray.serve.deploy import check_port, tell_reason

SERVE = """The deployment failed to start 1 times in a row. Error:
ray::ServeReplica:llm-ray:LLMServer:m.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "core.py", line 1, in __init__
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
ENGINE = """(EngineCore pid=1) ERROR 11-24 20:13:14 [core.py:1] ValueError: To serve at least one request, 3 GiB KV cache is needed
(EngineCore pid=1) RuntimeError: WorkerProc initialization failed due to an exception in a background process
"""


def test_the_root_cause_is_told_from_the_engines_log() -> None:
    assert tell_reason(SERVE, ENGINE) == "ValueError: To serve at least one request, 3 GiB KV cache is needed"


def test_serves_own_error_is_told_where_the_engine_left_none() -> None:
    assert tell_reason("ray::X\nray.exceptions.FooError: gone\n", "") == "FooError: gone"
    assert tell_reason("replica died", "") == "replica died"


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} on 127.0.0.1 cannot be used"):
            check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["serve", "deploy", "--model", "./nowhere"], "nowhere", 1),
        (["serve", "--model", "no-such-name"], "no-such-name", 1),
        (["serve", "deploy", "--model", "organisation/model"], "not on this machine", 1),
        (["serve", "deploy", "--model", "{folder}", "--name", "a", "--name", "b"], "--name is given 2 times", 2),
        (["serve", "deploy", "--model", "{folder}", "--model", "{folder}"], "would be called the same", 2),
        (["serve", "deploy"], "Missing option '--model'", 2),
    ],
)
def test_wrong_use_is_told_before_anything_starts(
    arguments: list[str], message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))
    result = CliRunner().invoke(cli, [argument.format(folder=tmp_path) for argument in arguments])
    assert message in result.output
    assert result.exit_code == code
