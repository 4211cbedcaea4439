"""What is said when a model cannot be deployed; the deployment itself is tests/integration/api and
test_serve_life.py."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_ray.cli.main import cli
from llm_ray.errors import ServeError
from llm_ray.serve.deployments.deploy import check_port, root_cause

SERVE = """The deployment failed to start 1 times in a row. Error:
ray::ServeReplica:model:m:model.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "core.py", line 1, in __init__
RuntimeError: Traceback (most recent call last):
  File "core.py", line 2, in check
ValueError: To serve at least one request, 3 GiB KV cache is needed
"""


def test_the_root_cause_is_told() -> None:
    assert root_cause(SERVE) == "ValueError: To serve at least one request, 3 GiB KV cache is needed"
    assert root_cause("ray::X\nray.exceptions.FooError: gone\n") == "FooError: gone"
    assert root_cause("replica died") == "replica died"
    assert "llm-ray serve logs" in root_cause("")


def test_what_a_validation_says_of_the_fields_is_told() -> None:
    told = """RuntimeError: Failed to create vLLM engine config: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (20000) is greater than 8192 [type=value_error, input_value=ArgsKwargs(()), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.12/v/value_error
"""
    assert root_cause(told) == "RuntimeError: User-specified max_model_len (20000) is greater than 8192"


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
        (
            ["serve", "deploy", "--model", "organisation/model"],
            "organisation/model: no such folder, and the hub model",
            1,
        ),
        (["serve", "deploy", "--model", "{folder}", "--name", "a", "--name", "b"], "--name is given 2 times", 2),
        (["serve", "deploy", "--model", "{folder}", "--model", "{folder}"], "would have the same name", 2),
        (["serve", "deploy"], "nothing to deploy: name a model", 2),
        (["serve", "deploy", "--config", "chat", "--model", "x"], "--config and --model: the conf sets it", 2),
        (["serve", "deploy", "--model", "{folder}", "--adapter", "x"], "write it as NAME=RUN", 2),
        (["serve", "deploy", "--model", "{folder}", "--name", "v1"], "'v1' is a path of the endpoint: choose", 2),
        (
            ["serve", "deploy", "--model", "{folder}", "--engine", "transformers", "--adapter", "a=b"],
            "adapters need engine vllm or openvino",
            2,
        ),
        (["serve", "stop"], "name the models to stop, or use --all", 2),
        (["serve", "stop", "x"], "nothing is served on this machine", 1),
        (["serve", "logs", "x"], "nothing is served on this machine", 1),
    ],
)
def test_wrong_use_is_told_before_anything_starts(
    arguments: list[str], message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))
    result = CliRunner().invoke(cli, [argument.format(folder=tmp_path) for argument in arguments])
    assert message in result.output
    assert result.exit_code == code
