from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_ray.cli.main import cli
from llm_ray.errors import RunError
from llm_ray.runs.compare import compare, png_plot, terminal_plot
from llm_ray.runs.listing import find_run, list_runs, summary
from llm_ray.runs.metrics import MetricsWriter
from tests.runs import opened_run
from tests.unit.runs.conftest import MakeConf
from tests.unit.runs.test_folder import hold


def rows(start: float) -> Iterator[dict[str, float | int]]:
    yield {"step": 0, "validation_loss": start + 1}
    for step in range(1, 31):
        row: dict[str, float | int] = {
            "step": step,
            "total_steps": 30,
            "loss": start / step,
            "tokens": 100,
            "tokens_per_second": 50.0,
            "seconds": 2.0,
        }
        yield row | ({"validation_loss": start / step + 0.1} if step % 10 == 0 else {})


@pytest.fixture
def runs(make_conf: MakeConf) -> Path:
    """Two done runs of different ranks, with metrics and an evaluation."""
    for name, rank, start in (("lora-r8", 8, 3.0), ("lora-r16", 16, 2.0)):
        conf = make_conf(name, tuning={"lora": {"r": rank}})
        with opened_run(conf, force=False) as run:
            run.mark_done("prepare", "a", 2)
            writer = MetricsWriter(run.path, tensorboard=False, resume_from_step=0)
            for row in rows(start):
                writer.write(row)
            writer.close()
            run.update_result(
                "evaluation",
                {
                    "rows": 2,
                    "base": {"exact_match": 0.0},
                    "finetuned": {"exact_match": rank / 16, "rating_accuracy": 0.75},
                },
            )
    return conf.paths.runs


def llm_ray(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["runs", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_in_a_line(runs: Path) -> None:
    run = summary(runs / "lora-r8")
    assert asdict(run) | {"created": None, "updated": None} == {
        "name": "lora-r8",
        "path": str(runs / "lora-r8"),
        "state": "done",
        "reason": "",
        "base": "tiny",
        "objective": "sft",
        "method": "lora",
        "step": 30,
        "total_steps": 30,
        "loss": 0.1,
        "validation_loss": 0.2,
        "tokens_per_second": 50.0,
        "created": None,
        "updated": None,
    }


def test_running_and_interrupted_runs_are_told_apart(make_conf: MakeConf) -> None:
    conf = make_conf()
    process = hold(conf)
    try:
        assert summary(conf.run_dir).state == "running"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert summary(conf.run_dir).state == "interrupted"


def test_a_damaged_run_does_not_hide_the_others(runs: Path) -> None:
    (runs / "lora-r8" / "run.json").write_text("{")
    (runs / "no-run").mkdir()
    assert {run.name: run.state for run in list_runs(runs)} == {"lora-r8": "damaged", "lora-r16": "done"}
    assert "damaged" in llm_ray("list", "--runs", str(runs))


def test_the_nearest_names_are_offered(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did you mean lora-r8"):
        find_run(runs, "lora-8")
    with pytest.raises(RunError, match="there are lora-r16, lora-r8"):
        find_run(runs, "zzz")
    with pytest.raises(RunError, match="contains no runs"):
        find_run(tmp_path / "none", "x")
    with pytest.raises(RunError):
        find_run(runs / "lora-r8", "../lora-r16")


def test_comparison(runs: Path) -> None:
    found = compare([runs / "lora-r8", runs / "lora-r16"], "loss")
    assert found.conf == {"tuning.lora.r": [8, 16]}
    assert found.figures["exact match (finetuned)"] == [0.5, 1.0]
    assert found.figures["tokens"] == [3000, 3000]
    assert found.figures["lowest validation loss"] == pytest.approx([0.2, 2 / 30 + 0.1])
    assert found.curves["lora-r8"] == (list(range(1, 31)), [3.0 / step for step in range(1, 31)])
    assert compare([runs / "lora-r8"], "validation_loss").curves["lora-r8"][0] == [0, 10, 20, 30]
    with pytest.raises(RunError, match="did you mean validation_loss"):
        compare([runs / "lora-r8"], "validation_los")


def test_plots(runs: Path, make_conf: MakeConf, tmp_path: Path) -> None:
    with opened_run(make_conf("empty"), force=False):
        pass
    found = compare([runs / "lora-r8", runs / "empty", runs / "lora-r16"], "loss")
    text = terminal_plot(found, width=80, height=20)
    assert "lora-r8" in text and "lora-r16" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" in terminal_plot(found, color=True)
    png_plot(found, tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1200, 675)
    with pytest.raises(RunError, match=r"none/loss\.png cannot be written: No such file"):
        png_plot(found, tmp_path / "none" / "loss.png")


def test_commands(runs: Path, tmp_path: Path) -> None:
    folder = ("--runs", str(runs))
    lines = llm_ray("list", *folder).splitlines()
    assert {tuple(line.split()[:2]) for line in lines[1:]} == {("lora-r8", "done"), ("lora-r16", "done")}
    assert {run["name"] for run in json.loads(llm_ray("list", "--json", *folder))} == {"lora-r8", "lora-r16"}

    shown = llm_ray("show", "lora-r8", *folder)
    for part in (
        "lora-r8: done",
        "lora r 8",
        "prepare  ",
        "30 of 30",
        "exact match",
        "rating accuracy        0.75",
        "sha256",
        "hosts",
    ):
        assert part in shown
    as_json = json.loads(llm_ray("show", "lora-r8", "--json", *folder))
    assert as_json["conf"]["tuning"]["lora"]["r"] == 8
    assert as_json["result"]["evaluation"]["rows"] == 2
    assert as_json["output"] is None

    compared = llm_ray("compare", "lora-r8", "lora-r16", "--png", str(tmp_path / "x.png"), *folder)
    assert "tuning.lora.r" in compared and "loss by step" in compared
    assert (tmp_path / "x.png").is_file()
    assert json.loads(llm_ray("compare", "lora-r8", "lora-r16", "--json", *folder))["conf"] == {
        "tuning.lora.r": [8, 16]
    }


def test_wrong_use(runs: Path) -> None:
    once = CliRunner().invoke(cli, ["runs", "compare", "lora-r8", "--runs", str(runs)])
    assert once.exit_code == 2 and "at least two runs" in once.output
    unknown = CliRunner().invoke(cli, ["runs", "show", "lora-8", "--runs", str(runs)])
    assert unknown.exit_code == 1 and "did you mean lora-r8" in unknown.output


def test_no_runs(tmp_path: Path) -> None:
    assert "no runs in" in llm_ray("list", "--runs", str(tmp_path))
    assert llm_ray("list", "--json", "--runs", str(tmp_path)).strip() == "[]"
