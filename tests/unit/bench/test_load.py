"""`llm-ray bench serve` against a real server, and its figures against ones worked out by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llm_ray.bench.load import Failure, Load, LoadReport, Sample, Spread, _Stream, run_load
from llm_ray.bench.prompts import builtin_prompts
from llm_ray.bench.report import figures, plot, table
from llm_ray.cli.main import cli
from llm_ray.client.endpoint import parse
from llm_ray.client.errors import Broken, Refused, Unreachable
from llm_ray.client.prompts import Prompt
from llm_ray.errors import ConfError
from tests.unit.client.server import Server

WORDS = Prompt("one two three four")


def load(server: Server, model: str = "echo", prompt: Prompt = WORDS, **how: Any) -> LoadReport:
    return run_load(
        parse(server.api),
        model,
        itertools.repeat(prompt),
        Load(**{"requests": 12, "concurrency": 4, "warmup": 0, **how}),
    )


def bench(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        cli, ["bench", "serve", "--model_endpoint", url, *arguments], prog_name="llm-ray", catch_exceptions=False
    )


# Loads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("completion", [False, True])
def test_so_many_at_once(server: Server, completion: bool) -> None:
    report = load(server, completion=completion, max_tokens=3, ignore_eos=True)
    assert (len(report.samples), report.failures) == (12, [])
    assert server.most == 4
    assert (report.prompt_tokens, report.output_tokens) == (60, 36)
    assert all(len(sample.arrivals) == 3 for sample in report.samples)  # the chunk with the role is none
    assert all(0 < sample.first <= sample.last <= report.seconds for sample in report.samples)
    asked = {"prompt": WORDS.content} if completion else {"messages": [{"role": "user", "content": WORDS.content}]}
    options = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_tokens": 3,
        "ignore_eos": True,
    }
    assert server.requests[0] == {"model": "echo", **asked, **options}
    assert report.client_cpu_seconds > 0


def test_the_warmup_is_in_no_figure(server: Server) -> None:
    report = load(server, warmup=3)
    assert (len(report.samples), len(server.requests)) == (12, 15)
    with pytest.raises(Refused, match="404"):
        load(server, "nobody", warmup=1)


@pytest.mark.parametrize("keep_alive", [True, False])
def test_connections_are_kept_unless_each_request_shall_have_its_own(server: Server, keep_alive: bool) -> None:
    assert not load(server, keep_alive=keep_alive).failures
    assert {headers.get("connection") == "close" for headers in server.headers} == {not keep_alive}


def test_a_duration(server: Server) -> None:
    report = load(server, requests=None, duration=0.3)
    assert len(report.samples) > 1
    assert all(sample.sent < 0.3 for sample in report.samples)
    assert report.seconds >= 0.3


def test_poisson_arrivals(server: Server) -> None:
    report = load(server, concurrency=None, rate=50.0, requests=40, seed=1)
    again = load(server, concurrency=None, rate=50.0, requests=40, seed=1)
    expected = np.cumsum([0.0, *np.random.default_rng(1).exponential(1 / 50, 39)])
    for one in (report, again):
        sent = sorted(sample.sent for sample in one.samples)
        assert len(sent) == 40
        late = np.array(sent) - expected
        assert late.min() >= 0
        assert np.median(late) < 1  # on a machine that is busy; at a tenth of the rate it is four times that
    for_a_while = load(server, concurrency=None, rate=100.0, requests=None, duration=0.3, seed=1)
    due = np.cumsum([0.0, *np.random.default_rng(1).exponential(1 / 100, 99)])
    assert len(for_a_while.samples) == (due < 0.3).sum(), "those that are due in that time, and no others"


def test_a_slow_answer_does_not_hold_up_arrivals(server: Server) -> None:
    report = load(server, "slow", concurrency=None, rate=1000.0, requests=5, timeout=2)
    assert report.failures_by_kind == {"timeout": 5}
    assert max(failure.sent for failure in report.failures) < 2


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("full", "status 429"),
        ("down", "status 503"),
        ("nobody", "status 404"),
        ("torn", "broken"),
        ("short", "broken"),
        ("error", "broken"),
        ("garbage", "broken"),
        ("foreign", "broken"),
        ("page", "broken"),
        ("counted", "broken"),
        ("slow", "timeout"),
    ],
)
def test_failures_are_counted_by_kind_and_in_no_figure(server: Server, model: str, kind: str) -> None:
    report = load(server, model, requests=4, timeout=0.2 if kind == "timeout" else 30)
    assert report.failures_by_kind == {kind: 4}
    assert (report.samples, report.output_tokens_per_second) == ([], 0)
    assert (report.time_to_first_token, report.end_to_end, report.inter_token_latency) == (None, None, None)
    assert all(server.api in failure.message for failure in report.failures)
    assert figures(report)["failure_messages"].keys() == {kind}


def test_nothing_listens(server: Server, unused: int) -> None:
    endpoint = parse(f"http://127.0.0.1:{unused}/v1")
    report = run_load(endpoint, "m", itertools.repeat(WORDS), Load(concurrency=2, requests=3, warmup=0))
    assert report.failures_by_kind == {"unreachable": 3}
    with pytest.raises(Unreachable, match="nothing listens"):
        run_load(endpoint, "m", itertools.repeat(WORDS), Load(concurrency=2, requests=3))


def test_an_endpoint_that_refuses_at_once_is_not_hammered(server: Server) -> None:
    assert len(load(server, "down", requests=None, duration=0.45, concurrency=2).failures) <= 12


def test_a_load_is_of_one_kind() -> None:
    for how in ({}, {"concurrency": 1}, {"requests": 1}, {"concurrency": 1, "rate": 1.0, "requests": 1}):
        with pytest.raises(ConfError, match="give either"):
            Load(**how)


# Streams --------------------------------------------------------------------------------------------------------------


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def said(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"delta": {"content": text}, "finish_reason": finish}], usage=None)


STREAM = (
    b": a comment\r\n\r\n"
    + event(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    + said("ü")
    + said("")
    + said("🙂", "stop").replace(b"\n", b"\r\n")
    + event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
    + b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 7, 100, len(STREAM)])
def test_events_may_be_cut_anywhere(size: int) -> None:
    stream = _Stream(parse("http://127.0.0.1/v1"))
    for at in range(0, len(STREAM), size):
        stream.read(STREAM[at : at + size], float(at))
    sample = stream.sample(1.0)
    assert (sample.sent, sample.prompt_tokens, sample.output_tokens, len(sample.arrivals)) == (1.0, 7, 3, 3)
    ends = [STREAM.index(b"\n", STREAM.index(line.rstrip())) for line in (said("ü"), said(""), said("🙂", "stop"))]
    assert sample.arrivals == [end - end % size for end in ends]


@pytest.mark.parametrize(
    "chunk", [b"data: []\n", b'data: {"choices": 3}\n', b'data: {"choices": [{}]}\n', b'data: {"error": "no"}\n']
)
def test_events_of_another_api(chunk: bytes) -> None:
    with pytest.raises(Broken, match="does not answer like an OpenAI API"):
        _Stream(parse("http://127.0.0.1/v1")).read(chunk, 0.0)


# Figures --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> LoadReport:
    """Three answers, of 3 tokens in 3 chunks, 5 in 3, and one; a failure; in 2 seconds."""
    samples = [Sample(0.0, [0.1, 0.2, 0.4], 10, 3), Sample(0.1, [0.3, 0.5, 0.7], 20, 5), Sample(1.0, [0.8], 30, 1)]
    return LoadReport(
        "http://h/v1",
        "m",
        Load(concurrency=2, requests=4),
        samples,
        [Failure(0.5, 0.6, "status 503", "no replica")],
        2.0,
        0.5,
    )


def test_figures_by_hand(report: LoadReport) -> None:
    assert (report.requests_per_second, report.output_tokens_per_second, report.total_tokens_per_second) == (
        1.5,
        4.5,
        34.5,
    )
    assert report.time_per_output_token and report.time_per_output_token.mean == pytest.approx(0.125)
    assert report.end_to_end and report.end_to_end.p50 == 0.7
    assert report.inter_token_latency and report.inter_token_latency.p50 == pytest.approx(0.2)
    assert report.client_cpu_share == 0.25
    assert Spread.of([]) is None


def test_the_table(report: LoadReport) -> None:
    text = "\n".join(table(report))
    assert "requests          3 answered, 1 failed (status 503: 1) in 2.0 s" in text
    assert "client CPU        0.50 s, 25% of a core" in text
    assert "time to first token          400.0     300.0" in text
    assert "load generator may" not in text
    report.client_cpu_seconds = 1.9
    assert "load generator may" in "\n".join(table(report))
    report.samples.clear()
    assert "time to first token              –" in "\n".join(table(report))


@pytest.mark.parametrize("answered", [True, False])
def test_the_plot(report: LoadReport, tmp_path: Path, answered: bool) -> None:
    if not answered:
        report.samples.clear()
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(server: Server, tmp_path: Path) -> None:
    server.models = ("echo",)
    out = tmp_path / "new" / "bench"
    result = bench(server.api, "--requests", "10", "--concurrency", "2", "--output", str(out), "--prompt-tokens", "20")
    assert result.exit_code == 0
    assert f"echo at {server.api}: 2 at once, at most 128 tokens per answer" in result.stdout
    assert "10 answered, 0 failed in" in result.stdout
    assert "requests 10/10" in result.stderr
    kept = json.loads((out / "report.json").read_text())
    assert (kept["answered"], kept["load"]["concurrency"], len(kept["requests"])) == (10, 2, 10)
    assert (out / "plot.png").exists()
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert len(set(asked)) == 11


def test_the_command_as_json(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("first one\nsecond one\n")
    arguments = ["--model", "echo", "--rate", "100", "--requests", "5", "--file", str(file), "--warmup", "0", "--json"]
    result = bench(server.api, *arguments)
    found = json.loads(result.stdout)
    assert (found["answered"], found["failed"], found["load"]["rate"], found["output_tokens"]) == (5, 0, 100, 10)
    assert set(found["time_to_first_token_seconds"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert [request["messages"][0]["content"] for request in server.requests] == ["first one", "second one"] * 2 + [
        "first one"
    ]


def test_failures_end_the_command_with_code_1(server: Server) -> None:
    arguments = [server.api, "--model", "busy", "--requests", "4", "--concurrency", "1", "--warmup", "0"]
    result = bench(*arguments)
    assert result.exit_code == 1
    assert "3 answered, 1 failed (status 429: 1)" in result.stdout
    assert "1 of 4 requests failed, the first after" in result.stderr and "is busy" in result.stderr
    server.requests.clear()
    assert bench(*arguments, "--allow-failures").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rate", "1", "--concurrency", "2"], "give either --concurrency or --rate"),
        (["--requests", "1", "--duration", "2"], "give either --requests or --duration"),
        (["--requests", "0"], "is not in the range"),
    ],
)
def test_wrong_use(server: Server, arguments: list[str], reason: str) -> None:
    result = bench(server.api, *arguments)
    assert (result.exit_code, reason in result.stderr) == (2, True)


def test_a_models_own_route_is_no_place_for_a_load(server: Server) -> None:
    result = bench(server.route("echo"))
    assert result.exit_code == 2
    assert f"use the OpenAI API, {server.api}, with --model echo" in result.stderr


# Prompts that ship ----------------------------------------------------------------------------------------------------


def test_prompts_that_ship_are_the_same_for_a_seed_and_begin_differently() -> None:
    first, again, other = (list(itertools.islice(builtin_prompts(64, seed), 50)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({str(prompt.content).split()[0] for prompt in first}) == 50


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1000])
def test_prompts_that_ship_are_about_as_long_as_asked(smollm2: Path, tokens: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lengths = [
        len(tokenizer(str(prompt.content)).input_ids) for prompt in itertools.islice(builtin_prompts(tokens), 20)
    ]
    assert np.mean(lengths) == pytest.approx(tokens, rel=0.15, abs=2)
