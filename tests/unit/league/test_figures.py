"""The league's figures against ones worked out by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.league.quality import perplexity
from benchmarks.league.report import plot, summary, tables
from benchmarks.league.run import Cell, figures, last_words
from benchmarks.league.shares import Median, decode_share, prefill_share
from benchmarks.league.weights import Shape, requantize, shape, step_bytes
from llm_ray.bench.load import Failure, Load, LoadReport, Sample
from llm_ray.errors import ModelError

TIED = Shape(parameters=1000, head=200, tied=True, kv_values=8)
UNTIED = Shape(parameters=1200, head=200, tied=False, kv_values=8)


def test_median_and_spread_of_rounds() -> None:
    assert Median.of([3.0, 1.0, 2.0, 10.0]) == Median(2.5, 1.0, 10.0, 4)
    assert Median.of([]) is None


def test_decoding_reads_the_weights_once_a_step() -> None:
    assert decode_share(step_bytes=2_000_000, seconds_per_token=0.001, gb_per_s=4.0) == pytest.approx(0.5)


def test_a_table_of_embeddings_that_is_no_output_layer_is_not_read() -> None:
    assert step_bytes(TIED, 4000) == 4000
    assert step_bytes(UNTIED, 4800) == 4000


def test_prefill_computes_the_output_layer_once() -> None:
    expected = 2 * (800 * 10 + 200) / 1e-6 / 1e9
    for of in (TIED, UNTIED):
        assert prefill_share(of, 10, 1e-6, gflops=100.0) == pytest.approx(expected / 100)


def test_perplexity_of_even_odds() -> None:
    assert perplexity([math.log(7)] * 5) == pytest.approx(7)


def test_a_model_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "hidden_size": 8}')
    with pytest.raises(ModelError, match=r"config\.json has no num_hidden_layers"):
        shape(tmp_path)


def test_the_figures_of_a_load() -> None:
    report = LoadReport("http://127.0.0.1:1/v1", "m", Load(concurrency=1, requests=3))
    report.samples = [Sample(0.0, [0.1, 0.2, 0.3], 30, 3), Sample(0.3, [0.3, 0.5, 0.9], 34, 3)]
    report.failures = [Failure(1.2, 1.3, "status 503", "busy")]
    report.seconds = 2.0
    found = figures(report, cpu_seconds=0.6)
    assert found["output_tokens_per_second"] == 3
    assert (found["prompt_tokens_per_request"], found["output_tokens_per_request"]) == (32, 3)
    assert found["cpu_seconds_per_1000_tokens"] == pytest.approx(100)
    assert (found["failed"], found["failures"]) == (1, {"status 503": "busy"})
    assert [found[f"ttft_{p}"] for p in ("p50", "p95", "p99")] == pytest.approx([0.2, 0.29, 0.298])
    assert [found[f"tpot_{p}"] for p in ("p50", "p95", "p99")] == pytest.approx([0.2, 0.29, 0.298])
    report.samples = []
    assert figures(report, cpu_seconds=0.6) == {"reason": "busy"}


def test_requests_overlap() -> None:
    assert [Cell(count, 32, False).requests for count in (1, 4, 64)] == [4, 8, 128]


def test_why_a_server_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text, words in (("", "it wrote nothing"), ("a\nValueError: b\nbye\n", "ValueError: b"), ("a\nb\n\n", "b")):
        log.write_text(text)
        assert last_words(log) == words


def _row(round_: int, rate: float, **other: Any) -> dict[str, Any]:
    times = {f"{name}_{p}": 0.5 for name in ("ttft", "tpot") for p in ("p50", "p95", "p99")}
    figures = {"prompt_tokens_per_request": 32, "cpu_seconds_per_1000_tokens": 7.0, "memory_bytes": 2**20, "failed": 0}
    cell = {"round": round_, "concurrency": 1, "prompt": 32, "shared": False}
    return cell | figures | times | {"output_tokens_per_second": rate} | other


@pytest.fixture
def results() -> dict[str, Any]:
    entry = {"form": "int8", "arithmetic": "int8", "stored_bytes": 1000, "step_bytes": 1000, "perplexity": 12.345}
    limit = {"memory_gb_per_s": 1e-5, "gflops": {"fp32": 1.0, "bf16": 2.0, "int8": 1e-3}}
    starts = [{"round": number, "seconds_to_first_token": 5.0 + number} for number in range(3)]
    rows = [_row(0, 10.0), _row(1, 30.0), _row(2, 20.0), _row(0, 50.0, concurrency=4, memory_bytes=2**21)]
    rows.append({"round": 1, "concurrency": 4, "prompt": 32, "shared": False, "reason": "timed out"})
    quick = entry | {"starts": starts, "rows": rows}
    gone = {"form": "bf16", "arithmetic": "bf16", "starts": [], "rows": [], "reason": "this CPU has no bf16"}
    return {"limits": [limit] * 3, "servers": {"quick": quick, "gone": gone}}


def test_the_summary(results: dict[str, Any]) -> None:
    found = summary(results, TIED)
    assert found["limits"] == {"memory_gb_per_s": 1e-5, "fp32": 1.0, "bf16": 2.0, "int8": 1e-3}
    assert found["servers"]["quick"]["seconds_to_first_token"]["median"] == 6
    assert found["servers"]["quick"]["most_memory_bytes"] == 2**21
    assert found["servers"]["gone"] == {"seconds_to_first_token": None, "most_memory_bytes": None}
    one, four = found["loads"]
    assert one["output_tokens_per_second"] == {"median": 20, "least": 10, "most": 30, "rounds": 3}
    assert one["decode_share"] == pytest.approx(1000 / 0.5 / 1e4)
    assert one["prefill_share"] == pytest.approx(2 * (800 * 32 + 200) / 0.5 / 1e6)
    assert (four["concurrency"], four["output_tokens_per_second"]["rounds"]) == (4, 1)
    assert four["prefill_share"] is None  # the first token of several at once waits for the others' prompts


def test_the_tables(results: dict[str, Any]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables(results, summary(results, TIED)):
        console.print(table)
    text = console.export_text()
    lines = [line for line in text.splitlines() if "gone" in line or "quick" in line]
    assert len(lines) == 4
    assert "12.35" in lines[0] or "12.34" in lines[0]
    assert "6.0 (5.0 to 7.0)" in lines[0] and "timed out" in lines[0]
    assert "this CPU has no bf16" in lines[1]
    assert "20.0" in lines[2] and "10.0 to 30.0" in lines[2] and "20%" in lines[2] and "500 / 500 / 500" in lines[2]


def test_a_run_that_ended_before_its_first_round(results: dict[str, Any], tmp_path: Path) -> None:
    results["limits"] = []
    results["servers"]["quick"] |= {"rows": [], "starts": []}
    found = summary(results, TIED)
    assert found["loads"] == []
    assert [table.row_count for table in tables(results, found)] == [2]
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot(results: dict[str, Any], tmp_path: Path) -> None:
    plot(summary(results, TIED), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_gguf_in_another_quantization(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    matrix = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "b"])
    packed = quantize(matrix, GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    requantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")
    reader = GGUFReader(tmp_path / "b.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["llama.context_length"]) == ("llama", 77)
    assert (fields["tokenizer.ggml.tokens"], fields["general.file_type"]) == (["a", "b"], 7)
    found = {tensor.name: tensor for tensor in reader.tensors}
    wide = found["blk.0.attn_q.weight"]
    assert wide.tensor_type == GGMLQuantizationType.Q8_0
    expected = dequantize(packed, GGMLQuantizationType.Q4_1)
    assert dequantize(wide.data, wide.tensor_type) == pytest.approx(expected, abs=float(np.abs(expected).max()) / 127)
    assert found["output_norm.weight"].data == pytest.approx(matrix[0])
