"""A sweep through the real command: killed in the middle, gone on with, and its best conf trained again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_ray.runs.metrics import read_metrics
from tests.integration.tiny import llama
from tests.waiting import until

LLM_RAY = Path(sys.executable).parent / "llm-ray"
TRIALS = 4
PATIENCE = 420.0  # seconds


@pytest.mark.long  # five starts of training
def test_a_killed_sweep_goes_on_and_its_best_conf_makes_the_same_model(smollm2: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is code {n}?", "completion": f"Code {n} means stop."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "name": "best",
        "config": "lora",
        "set": {
            "train": str(tmp_path / "rows.jsonl"),
            "model": str(llama(tmp_path / "model", smollm2)),
            "data.validation": 0.2,
            "data.max_length": 64,
            "training.max_steps": 6,
            "training.precision": "fp32",
            "runtime.cpus_per_worker": 1,
            "evaluation.samples": 1,
            "evaluation.max_new_tokens": 2,
        },
        "search": {
            "training.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "tuning.lora.r": {"choice": [1, 2]},
        },
        "trials": TRIALS,
        "cpus": 1,  # one after the other, so that one has ended when the next is under way
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(given))  # JSON is YAML
    runs = tmp_path / "home" / "runs"
    sweep = runs / "best" / "sweep"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"LLM_RAY_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen([LLM_RAY, *arguments], stdout=out, stderr=out, env=environment, process_group=0)

    def trials() -> dict[str, dict[str, Any]]:
        return {file.parent.name: json.loads(file.read_text()) for file in sweep.glob("trials/*/trial.json")}

    # Killed in the middle of the second trial.
    command = start("sweep", "--config", str(tmp_path / "sweep.yaml"))
    under_way = sweep / "trials" / "trial-002" / "metrics.jsonl"
    until(lambda: under_way.exists() or command.poll() is not None, "a second trial", PATIENCE)
    command.send_signal(signal.SIGKILL)
    command.wait(PATIENCE)
    before = trials()
    assert before["trial-001"]["state"] == "done", log.read_text()
    assert before["trial-002"]["state"] == "begun"
    file = sweep / "trials" / "trial-001" / "metrics.jsonl"
    written = file.stat().st_mtime_ns

    command = start("sweep", "--config", str(tmp_path / "sweep.yaml"))
    assert command.wait(PATIENCE) == 0, log.read_text()
    after = trials()
    assert sorted(after) == [f"trial-00{number}" for number in range(1, TRIALS + 1)]
    assert after["trial-001"] == before["trial-001"] and file.stat().st_mtime_ns == written, "kept, not repeated"
    assert after["trial-002"]["values"] == before["trial-002"]["values"], "gone on with"
    assert {trial["state"] for trial in after.values()} <= {"done", "stopped"}

    # The best by the validation rows is the run: judged by others, and exported.
    done = [trial for trial in after.values() if trial["state"] == "done"]
    best = min(done, key=lambda trial: float(trial["metric"]))
    report = json.loads((sweep / "report.json").read_text())
    assert report["best"] == best
    assert set(report["held_out"]) == {"base", "finetuned"}
    assert report["held_out"]["finetuned"]["validation_loss"] != best["metric"]
    assert (runs / "best" / "output" / "model.safetensors").is_file()
    assert {file.name for file in sweep.glob("*.png")} >= {"curves.png"}
    stats = json.loads((runs / "best" / "prepared" / "stats.json").read_text())
    assert [stats[split]["rows"] for split in ("train", "validation", "test")] == [28, 8, 4]

    # Its conf is that of the run, and trains to the same loss under another name.
    command = start(
        "finetune",
        "--config",
        str(sweep / "best.yaml"),
        "--set",
        "name=again",
        "--stage",
        "prepare",
        "--stage",
        "train",
    )
    assert command.wait(PATIENCE) == 0, log.read_text()
    losses = [
        row["validation_loss"]
        for row in read_metrics(runs / "again" / "metrics.jsonl")
        if row.get("validation_loss") and row["step"]
    ]
    assert min(losses) == best["metric"]
