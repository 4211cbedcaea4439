"""LoRA finetuning: real (unpadded) tokens per second and final loss, against TRL's SFTTrainer with its defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.table import comparison
from llm_ray.conf.finetune import Data
from llm_ray.data.formats import Conversation, Formatter
from llm_ray.data.sources import read


def conversations(data: Path) -> Iterator[Conversation]:
    """Yields the rows of a file that are conversations."""
    formatter = Formatter(Data(train=(str(data),)), "conversations")
    for row in read(str(data), on_bad_row=lambda error: None):
        if isinstance(content := formatter(row), Conversation):
            yield content


def write_rows(data: Path, count: int, work: Path) -> tuple[Path, Path]:
    """Writes the first rows of `data` as prompt and completion, which both sides read: one in eight for validation, the
    others for training."""
    lines: list[str] = []
    for content in conversations(data):
        if content.messages[-1]["role"] == "assistant":
            lines.append(
                json.dumps({"prompt": content.messages[:-1], "completion": content.messages[-1:]}, ensure_ascii=False)
                + "\n"
            )
        if len(lines) == count:
            break
    train, held_out = work / "train.jsonl", work / "held-out.jsonl"
    train.write_text("".join(line for number, line in enumerate(lines) if number % 8), encoding="utf-8")
    held_out.write_text("".join(lines[::8]), encoding="utf-8")
    return train, held_out


def messages(file: Path) -> Path:
    """Writes the same rows as `messages`, for llm-ray."""
    path = file.with_name(f"messages-{file.name}")
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    path.write_text(
        "".join(json.dumps({"messages": row["prompt"] + row["completion"]}, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def run_trl(module: str, *arguments: object) -> dict[str, float]:
    """Runs a baseline module in its own process and returns the figures that it prints."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"TRL failed:\n{process.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(process.stdout.strip().splitlines()[-1])
    return figures


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures both sides one after the other, on all cores of this machine."""
    cores = len(os.sched_getaffinity(0))
    train, held_out = write_rows(data, rows, work)
    given = ours.train("training", model, messages(train), messages(held_out), work, workers=1, cpus=cores)
    floor = run_trl("trl_floor", model, train, work / "runs" / "training" / "prepared", cores)
    table = [
        comparison(
            "LoRA, real tokens/s against TRL",
            given["tokens_per_second"],
            floor["tokens_per_second"],
            "2.3 x, then 3 x",
        ),
        comparison("final validation loss, against TRL's", given["loss_after"], floor["loss_after"], "at most 1.01 x"),
    ]
    return {"ours": given, "trl": floor, "table": table}
