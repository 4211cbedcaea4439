"""`llm-ray infer` against a real server, which answers, refuses, and breaks off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llm_ray.cli.main import cli
from tests.unit.client.server import KEY, MODELS, Server


def infer(url: str, *arguments: str, stdin: str | None = None, **environment: str) -> Result:
    return CliRunner().invoke(
        cli,
        ["infer", "--model_endpoint", url, *arguments],
        input=stdin,
        prog_name="llm-ray",
        env=environment,
        catch_exceptions=False,
    )


URLS: dict[str, Callable[[Server, str], list[str]]] = {
    "openai": lambda server, model: [server.api, "--model", model],
    "route": lambda server, model: [server.route(model)],
}
both = pytest.mark.parametrize("kind", list(URLS))


# Answers --------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_an_answer(server: Server, kind: str, stream: list[str]) -> None:
    result = infer(*URLS[kind](server, "echo"), "--prompt", "Grüße aus 東京 🙂 hier", *stream)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Grüße aus 東京 🙂 hier\n", "")
    assert server.requests[0]["stream"] is bool(stream)
    assert "authorization" not in server.headers[0]


@both
def test_an_answer_as_json(server: Server, kind: str) -> None:
    result = infer(*URLS[kind](server, "echo"), "--prompt", "one two", "--json")
    answer = json.loads(result.stdout)
    assert answer.pop("seconds") >= 0
    assert answer == {
        "model": "echo",
        "text": "one two",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


@both
def test_settings_are_sent_when_given(server: Server, kind: str) -> None:
    given = [
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--top_k",
        "7",
        "--seed",
        "3",
        "--stop",
        "a",
        "--stop",
        "b",
        "--max-tokens",
        "2",
    ]
    result = infer(*URLS[kind](server, "echo"), "--prompt", "one two three", "--system", "Be brief.", *given)
    assert result.stdout == "one two\n"
    assert "(cut off: raise" in result.stderr
    sent = server.requests[0]
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a", "b"], "top_k": 7}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two three"}]
    if kind == "openai":
        assert sent == {"model": "echo", "stream": False, "messages": messages, "max_tokens": 2, **sampling}
    else:
        assert sent == {"model": "echo", "stream": False, "text": messages, "config": {"max_new_tokens": 2, **sampling}}


@both
def test_nothing_is_sent_that_was_not_given(server: Server, kind: str) -> None:
    infer(*URLS[kind](server, "echo"), "--prompt", "hi")
    bodies = {
        "openai": {"model": "echo", "stream": False, "messages": [{"role": "user", "content": "hi"}]},
        "route": {"model": "echo", "text": "hi", "config": {}, "stream": False},
    }
    assert server.requests == [bodies[kind]]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_completion_takes_the_prompt_as_it_is(server: Server, stream: list[str]) -> None:
    result = infer(server.api, "--model", "echo", "--completion", "--prompt", "Once upon", *stream)
    assert result.stdout == "Once upon\n"
    assert server.requests[0]["prompt"] == "Once upon"


@pytest.mark.parametrize("arguments", [[], ["--prompt", "-"]])
def test_the_prompt_may_be_piped_in(server: Server, arguments: list[str]) -> None:
    assert infer(server.route("echo"), *arguments, stdin="from a pipe\n").stdout == "from a pipe\n"


def test_the_only_model_is_asked(server: Server) -> None:
    server.models = ("echo",)
    assert infer(server.api, "--prompt", "hi").stdout == "hi\n"


def test_of_several_models_one_must_be_named(server: Server) -> None:
    server.models = ("left", "right")
    result = infer(server.api, "--prompt", "hi")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "serves 2 models: name one with --model: left, right" in result.stderr
    server.models = ()
    result = infer(server.api, "--prompt", "hi")
    assert result.exit_code == 1
    assert "serves no model" in result.stderr


# Wrong use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", "a", "--file", "f.txt"], "cannot be combined"),
        (["--prompt", "a", "--stream", "--json"], "--stream shows one answer"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--model", "echo"], "already the route of one model"),
        (["--prompt", "a", "--completion"], "--completion: a model's own route supports only chat"),
        (["--prompt", "a", "--temperature", "-1"], "is not in the range"),
    ],
)
def test_wrong_use(server: Server, arguments: list[str], reason: str) -> None:
    result = infer(server.route("echo"), *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert server.requests == []


def test_a_completion_has_no_conversation(server: Server, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    result = infer(server.api, "--model", "echo", "--completion", "--file", str(tmp_path / "p.jsonl"))
    assert (result.exit_code, "p.jsonl:1: a conversation" in result.stderr) == (2, True)


# Failures -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("nobody", ": not found (404: The model `nobody` does not exist.). http"),
        ("down", "failed (503: no replica): see `llm-ray serve status`"),
        ("picky", "refused the request (400: bad is a bad word)"),
        ("page", "is this the right address?"),
        ("foreign", "is this the right address?"),
    ],
)
def test_refusals(server: Server, kind: str, stream: list[str], model: str, reason: str) -> None:
    result = infer(*URLS[kind](server, model), "--prompt", "a bad prompt", *stream)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: http://127.0.0.1")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr and "a bug in" not in result.stderr
    if model == "nobody":
        assert f"{server.api} serves {', '.join(MODELS)}" in result.stderr


@both
def test_a_busy_endpoint_is_asked_again(server: Server, kind: str) -> None:
    for model in ("busy", "waking"):
        result = infer(*URLS[kind](server, model), "--prompt", "hi")
        assert (result.exit_code, result.stdout) == (0, "hi\n")
        assert "Retrying in 0 s" in result.stderr
    assert len(server.requests) == 4


@both
def test_an_endpoint_that_stays_busy(server: Server, kind: str) -> None:
    result = infer(*URLS[kind](server, "full"), "--prompt", "hi", "--timeout", "4")
    assert result.exit_code == 1
    # At once, after 1 s, and after 2 s more unless the machine is slow; 4 s more would be too late.
    assert len(server.requests) in {2, 3}
    assert "is busy, or the API key's limit is reached (429: too many requests)" in result.stderr


@both
def test_a_torn_stream(server: Server, kind: str) -> None:
    result = infer(*URLS[kind](server, "torn"), "--prompt", "one two three", "--stream")
    assert (result.exit_code, result.stdout) == (1, "one")
    assert "was lost before the answer was complete" in result.stderr


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("short", "without a finish_reason"),
        ("error", "aborted the answer: the engine died"),
        ("garbage", "did not answer with JSON"),
    ],
)
def test_streams_that_end_otherwise(server: Server, model: str, reason: str) -> None:
    result = infer(server.api, "--model", model, "--prompt", "one two three", "--stream")
    assert result.exit_code == 1
    assert reason in result.stderr


@both
def test_an_answer_that_is_no_json(server: Server, kind: str) -> None:
    result = infer(*URLS[kind](server, "garbage"), "--prompt", "one two")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: http" in result.stderr


@both
def test_an_endpoint_that_does_not_answer(server: Server, kind: str) -> None:
    result = infer(*URLS[kind](server, "slow"), "--prompt", "hi", "--timeout", "0.3")
    assert result.exit_code == 1
    assert "did not complete the answer within 0.3 s (--timeout)" in result.stderr
    assert server.gone.wait(5)


@pytest.mark.parametrize("path", ["v1", "echo"])
def test_nothing_listens(server: Server, path: str, unused: int) -> None:
    result = infer(f"http://127.0.0.1:{unused}/{path}", "--prompt", "hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        f"nothing listens at http://127.0.0.1:{unused}/{path}: is the model deployed (`llm-ray serve status`)"
        in result.stderr
    )


def test_a_host_that_is_not_known() -> None:
    result = infer("http://no-such-host.invalid/v1", "--model", "m", "--prompt", "hi")
    assert result.exit_code == 1
    assert "the host of http://no-such-host.invalid/v1 is unknown" in result.stderr


def test_no_tls(server: Server) -> None:
    result = infer(server.api.replace("http:", "https:"), "--model", "echo", "--prompt", "hi")
    assert result.exit_code == 1
    assert "is it http:// rather than https://?" in result.stderr


# Keys -----------------------------------------------------------------------------------------------------------------


@both
def test_keys(server: Server, kind: str, tmp_path: Path) -> None:
    server.keys = True
    (tmp_path / "key").write_text(f"{KEY}\n")
    ask = [*URLS[kind](server, "echo"), "--prompt", "hi"]
    assert infer(*ask, LLM_RAY_API_KEY=KEY, OPENAI_API_KEY="other").stdout == "hi\n"
    assert infer(*ask, OPENAI_API_KEY=KEY).stdout == "hi\n"
    assert infer(*ask, "--api-key-file", str(tmp_path / "key")).stdout == "hi\n"
    assert infer(*ask, "--api-key", KEY).stdout == "hi\n"
    none, wrong, poor = infer(*ask), infer(*ask, LLM_RAY_API_KEY="sk-wrong"), infer(*ask, LLM_RAY_API_KEY="sk-poor")
    assert (none.exit_code, wrong.exit_code, poor.exit_code) == (1, 1, 1)
    assert "requires an API key (401: No API key): set LLM_RAY_API_KEY, or use --api-key-file FILE" in none.stderr
    assert "rejects the API key from LLM_RAY_API_KEY (401: Invalid API key)" in wrong.stderr
    assert (
        "the API key of LLM_RAY_API_KEY is not allowed to do this (403: this key may not use the model)" in poor.stderr
    )
    assert "sk-" not in wrong.stderr + poor.stderr


# Files of prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {n}\n" for n in range(20)))
    return file


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@both
def test_answers_go_to_standard_output_in_order(server: Server, kind: str, prompts: Path) -> None:
    result = infer(*URLS[kind](server, "echo"), "--file", str(prompts))
    assert result.stdout == "".join(f"{prompts}:{n + 1}\nprompt {n}\n\n" for n in range(20))
    assert "prompts 20/20" in result.stderr
    result = infer(*URLS[kind](server, "echo"), "--file", str(prompts), "--json")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == [f"prompt {n}" for n in range(20)]


@both
def test_answers_go_to_a_file(server: Server, kind: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    result = infer(
        *URLS[kind](server, "echo"), "--file", str(prompts), "--output", str(out), "--json", "--max-tokens", "5"
    )
    assert json.loads(result.stdout) == {"output": str(out), "prompts": 20, "asked": 20, "failed": 0}
    found = rows(out)
    assert sorted((row["index"], row["prompt"], row["text"]) for row in found) == [
        (n, f"prompt {n}", f"prompt {n}") for n in range(20)
    ]
    assert (found[0]["model"], found[0]["finish_reason"], found[0]["settings"]) == ("echo", "stop", {"max_tokens": 5})


def test_no_more_are_asked_at_once_than_said(server: Server, prompts: Path) -> None:
    infer(server.api, "--model", "echo", "--file", str(prompts), "--concurrency", "1")
    assert [request["messages"][0]["content"] for request in server.requests] == [f"prompt {n}" for n in range(20)]


def test_a_file_of_answers_is_gone_on_with(server: Server, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    infer(server.api, "--model", "echo", "--file", str(prompts), "--output", str(out))
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:12]) + lines[12][:30])  # as kill -9 leaves it
    server.requests.clear()
    result = infer(server.api, "--model", "echo", "--file", str(prompts), "--output", str(out))
    assert result.exit_code == 0
    assert f"{out} already has answers to 12 of 20 prompts" in result.stderr
    assert len(server.requests) == 8
    assert sorted(int(str(row["index"])) for row in rows(out)) == list(range(20))


def test_answers_to_something_else_are_not_mixed(server: Server, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    ask = [server.api, "--model", "echo", "--file", str(prompts), "--output", str(out)]
    infer(*ask)
    before = out.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("another\n" * 20)
    for arguments, reason in (
        ([*ask[:4], str(other), *ask[5:]], "answers a different prompt than number"),
        ([*ask[:2], "picky", *ask[3:]], "was answered by echo, not by picky"),
        ([*ask, "--seed", "1"], "was asked with no settings, not with seed 1"),
    ):
        result = infer(*arguments)
        assert result.exit_code == 2
        assert reason in result.stderr
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ["notes of mine", "notes\n", '{"a": 1}\n', '{"a": 1}', "[]\n"])
def test_a_file_that_holds_no_answers_is_left_alone(
    server: Server, prompts: Path, tmp_path: Path, content: str
) -> None:
    out = tmp_path / "notes.txt"
    out.write_text(content)
    result = infer(server.route("echo"), "--file", str(prompts), "--output", str(out))
    assert (result.exit_code, "notes.txt:1 is not an answer of llm-ray infer" in result.stderr) == (2, True)
    assert out.read_text() == content


def test_prompts_that_fail_are_told_and_asked_again(server: Server, tmp_path: Path) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "answers.jsonl"
    file.write_text("good 1\nbad 1\ngood 2\n" + "bad\n" * 12)
    ask = [server.api, "--model", "picky", "--file", str(file), "--output", str(out)]
    for already in (0, 2):
        server.requests.clear()
        result = infer(*ask)
        assert result.exit_code == 1
        assert "13 of 15 prompts were not answered; run the same command to ask them again:" in result.stderr
        assert f"\n  {file}:2: {server.api} refused the request (400: bad is a bad word)\n" in result.stderr
        assert "and 3 more" in result.stderr
        assert len(rows(out)) == 2
        assert len(server.requests) == 15 - already


def test_a_failure_leaves_a_gap_in_standard_output(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("good 1\nbad 1\ngood 2\n")
    result = infer(server.route("picky"), "--file", str(file))
    assert (result.exit_code, result.stdout) == (1, f"{file}:1\ngood 1\n\n{file}:3\ngood 2\n\n")


def test_an_endpoint_that_cannot_be_asked_ends_a_file_at_once(server: Server, prompts: Path, tmp_path: Path) -> None:
    server.keys = True
    out = tmp_path / "answers.jsonl"
    result = infer(server.api, "--model", "echo", "--file", str(prompts), "--output", str(out), "--concurrency", "4")
    assert result.exit_code == 1
    assert "requires an API key" in result.stderr
    assert f"{out} keeps the answers received so far: run the same command to continue from there" in result.stderr
    assert len(server.requests) <= 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(server: Server, tmp_path: Path, number: signal.Signals) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "a"}\n')
    command = [
        "env",
        "--default-signal",
        str(Path(sys.executable).with_name("llm-ray")),
    ]  # a shell's background job would ignore SIGINT
    command += ["infer", "--model_endpoint", server.route("slow")]
    with subprocess.Popen(
        [*command, "--file", str(file), "--output", str(out)], stderr=subprocess.PIPE, text=True
    ) as process:
        while not server.requests:
            assert process.poll() is None
            server.gone.wait(0.01)
        process.send_signal(number)
        assert process.stderr
        said = process.stderr.read()
        assert process.wait() == 130
    assert server.gone.wait(5)
    assert "Interrupted." in said and "Traceback" not in said
    assert f"{out} keeps the answers" in said


def test_a_reader_that_goes_away_is_no_defect(server: Server, prompts: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("llm-ray")),
        "infer",
        "--model_endpoint",
        server.route("echo"),
        "--file",
        str(prompts),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 1
    assert "a bug in" not in said and "Traceback" not in said
