"""`llm-ray infer` and `llm-ray bench serve` against the real model on real Ray."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_ray.bench.load import Failure, Load, LoadReport, Sample

QUESTION = "What is the capital of France?"
Run = Callable[..., subprocess.CompletedProcess[str]]


def at(base: str, path: str = "v1") -> list[str]:
    """The options that name a model: by the OpenAI API, or by its own route."""
    return ["--model_endpoint", f"{base}/{path}", *(["--model", "small"] if path == "v1" else [])]


@pytest.mark.parametrize("path", ["v1", "small"])
def test_an_answer_is_the_same_whole_streamed_and_from_a_pipe(run: Run, base: str, path: str) -> None:
    ask = ["infer", *at(base, path), "--temperature", "0", "--max-tokens", "16"]
    whole, streamed = run(*ask, "--prompt", QUESTION), run(*ask, "--prompt", QUESTION, "--stream")
    piped = run(*ask, "--json", stdin=QUESTION)
    answer = json.loads(piped.stdout)
    assert "Paris" in answer["text"]
    assert whole.stdout == streamed.stdout == f"{answer['text']}\n"
    assert (answer["model"], answer["finish_reason"]) == ("small", "stop")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


def test_a_file_of_prompts(run: Run, base: str, tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "answers.jsonl"
    rows = [
        {"prompt": QUESTION},
        {"messages": [{"role": "user", "content": "Say hello. 🙂"}]},
        {"instruction": "Name a", "input": "colour"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    ask = ["infer", *at(base), "--file", str(file), "--output", str(out), "--max-tokens", "8", "--seed", "1"]
    assert run(*ask).returncode == 0
    answers = {row["index"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert sorted(answers) == [0, 1, 2]
    assert all(row["text"] and row["usage"]["completion_tokens"] <= 8 for row in answers.values())
    again = run(*ask)
    assert (again.returncode, "already has answers to 3 of 3 prompts" in again.stderr) == (0, True)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize(
    ("path", "more", "reason"),
    [
        ("v1", ["--model", "nobody"], "small"),
        ("nobody", [], "small"),
        ("v1", ["--model", "small", "--system", "word " * 600], "refused the request (400: "),
        ("small", ["--system", "word " * 600], "refused the request (400: "),
    ],
)
def test_refusals_are_told(run: Run, base: str, path: str, more: list[str], reason: str, stream: list[str]) -> None:
    done = run("infer", "--model_endpoint", f"{base}/{path}", "--prompt", QUESTION, *more, *stream)
    assert (done.returncode, done.stdout) == (1, "")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr and "a bug in" not in done.stderr


def test_a_load(run: Run, base: str, tmp_path: Path) -> None:
    load = ["bench", "serve", *at(base), "--max-tokens", "16", "--ignore-eos"]
    done = run(*load, "--concurrency", "4", "--requests", "8", "--output", str(tmp_path / "bench"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["answered"], found["failed"], found["output_tokens"]) == (8, 0, 128)
    assert (
        0
        < found["time_per_output_token_seconds"]["p50"]
        < found["time_to_first_token_seconds"]["p50"]
        < found["end_to_end_seconds"]["p50"]
    )
    assert found["client_cpu_share"] < 0.5
    assert (tmp_path / "bench" / "plot.png").exists()


def test_figures_of_a_load_are_those_of_vllm() -> None:
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import SampleRequest, calculate_metrics

    samples = [Sample(0.0, [0.1, 0.2, 0.4], 10, 3), Sample(0.1, [0.3, 0.5, 0.7], 20, 5), Sample(1.0, [0.8], 30, 1)]
    report = LoadReport(
        "http://h/v1", "m", Load(concurrency=2, requests=4), samples, [Failure(0.5, 0.6, "status 503", "")], 2.0
    )
    outputs = [
        RequestFuncOutput(
            success=True,
            latency=sample.last,
            output_tokens=sample.output_tokens,
            ttft=sample.first,
            itl=list(np.diff(sample.arrivals)),
            prompt_len=sample.prompt_tokens,
            start_time=sample.sent,
        )
        for sample in samples
    ]
    outputs.append(RequestFuncOutput(success=False, error="503"))
    asked = [SampleRequest(prompt="", prompt_len=0, expected_output_len=0)] * 4
    theirs, _ = calculate_metrics(asked, outputs, report.seconds, None, [50, 90, 99], {})
    assert (theirs.completed, theirs.failed) == (len(samples), len(report.failures))
    assert theirs.request_throughput == pytest.approx(report.requests_per_second)
    assert theirs.output_throughput == pytest.approx(report.output_tokens_per_second)
    assert theirs.total_token_throughput == pytest.approx(report.total_tokens_per_second)
    for ours, name in (
        (report.time_to_first_token, "ttft"),
        (report.time_per_output_token, "tpot"),
        (report.inter_token_latency, "itl"),
        (report.end_to_end, "e2el"),
    ):
        assert ours
        percentiles = [value for _, value in getattr(theirs, f"percentiles_{name}_ms")]
        expected = [value * 1000 for value in (ours.mean, ours.p50, ours.p90, ours.p99)]
        assert [getattr(theirs, f"mean_{name}_ms"), *percentiles] == pytest.approx(expected)
