"""`llm-ray data from-documents` with the real model behind the real endpoint, up to rows that a finetune reads."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.integration.api.conftest import Run

PAGES = {
    "pump.md": "# Pump\n\nThe pump of hall seven runs on port 4711. It is oiled every Tuesday by Ada, who keeps the key of "
    "the hall.\n",
    "gate.txt": "The gate at the river opens at six in the morning and closes at nine in the evening, except on holidays, "
    "when it stays closed.\n",
}


def _asked(http: httpx.Client) -> float:
    """Requests that the endpoint has completed for the model."""
    lines = http.get("/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("llm_ray_requests_total") and '"small"' in line
    )


def test_documents_become_rows_that_a_finetune_reads(
    run: Run, base: str, http: httpx.Client, smollm2: Path, tmp_path: Path
) -> None:
    folder, rows = tmp_path / "docs", tmp_path / "rows.jsonl"
    folder.mkdir()
    for name, text in PAGES.items():
        (folder / name).write_text(text)
    # Support 0: a model of this size copies little from its passage, and the rows are to be seen.
    make = [
        *("data", "from-documents", str(folder), "--endpoint", f"{base}/v1", "--model", "small", "--output", str(rows)),
        *("--rows", "1", "--max-tokens", "120", "--held-out", "0.5", "--support", "0", "--json"),
    ]
    before = _asked(http)
    made = run(*make)
    assert made.returncode == 0, made.stderr
    assert _asked(http) - before == len(PAGES)
    learnt, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (rows, tmp_path / "rows.heldout.jsonl")
    )
    assert {row["source"]["file"] for row in learnt + held_out} == set(PAGES)
    assert len(learnt) == len(held_out) == 1
    for row in learnt + held_out:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
        assert row["source"]["passage"] in PAGES[row["source"]["file"]] and row["written_by"] == "small"

    again = run(*make)  # the model is asked nothing that it has answered
    assert (again.returncode, _asked(http) - before) == (0, len(PAGES)), again.stderr
    read = run(
        "data",
        "preview",
        "--config",
        "lora",
        "--set",
        f"train={rows}",
        "--set",
        "name=rows",
        "--set",
        f"model={smollm2}",
        "--no-color",
    )
    assert f"⟦{learnt[0]['messages'][1]['content']}" in read.stdout, read.stderr
