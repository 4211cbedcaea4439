"""The quickstart as a newcomer runs it: once the whole way, then again broken off in the middle."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

COMMAND = str(Path(sys.executable).with_name("llm-ray"))


FEW = ["--set", "training.max_steps=2", "--set", "runtime.workers=1"]


class Quickstart:
    """A home, and the quickstart's options in it."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home, self.command = home, [COMMAND, "quickstart", "--home", str(home), *options]

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command, capture_output=True, text=True, check=False)

    def report(self) -> dict[str, Any]:
        """What the questions came to."""
        run = self.home / "runs" / "quickstart"
        report: dict[str, Any] = json.loads((run / "quickstart.json").read_text())
        assert report["base"]["of"] == report["finetuned"]["of"] == 30
        assert report["base"]["right"] <= 1
        assert set(report["seconds"]) == {"model", "finetune", "deploy", "ask", "total"}
        answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
        assert sum(answer["finetuned"]["right"] for answer in answers) == report["finetuned"]["right"]
        assert all(answer["base"]["answer"] for answer in answers)
        assert (self.home / "models" / "smollm2-135m-instruct" / "config.json").is_file()
        return report


@pytest.fixture(scope="module")
def short(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Of two steps, which teach too little; the model was imported before."""
    home = tmp_path_factory.mktemp("short")
    shutil.copytree(smollm2, home / "models" / smollm2.name)
    return Quickstart(home, *FEW)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    return Quickstart(tmp_path_factory.mktemp("whole"))


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_settings_of_ones_own_that_teach_too_little_are_told(short: Quickstart) -> None:
    done = short.run()
    assert done.returncode == 1, done.stderr
    assert "answers less than 85% of the questions correctly" in done.stderr
    assert short.report()["finetuned"]["right"] < 0.85 * 30


def test_what_the_questions_depend_on_is_not_set(short: Quickstart) -> None:
    refused = subprocess.run(
        [*short.command, "--set", "data.max_length=64"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "--set data: the quickstart asks about its own data and model" in refused.stderr


@pytest.mark.timeout(1800)
@pytest.mark.long  # eight epochs; that a model learns is also tested by the API for finetuning
def test_the_finetuned_model_knows_what_the_base_model_cannot(whole: Quickstart) -> None:
    done = whole.run()
    assert done.returncode == 0, done.stderr
    assert whole.report()["finetuned"]["right"] >= 0.85 * 30
    assert str(whole.home / "runs" / "quickstart") in done.stdout


@pytest.mark.parametrize(
    ("of", "sent"),
    [pytest.param("whole", signal.SIGINT, marks=pytest.mark.long), ("short", signal.SIGTERM)],
)
def test_a_second_run_skips_what_is_done_and_stops_all_when_told_to(
    request: pytest.FixtureRequest, of: str, sent: signal.Signals
) -> None:
    command = request.getfixturevalue(of).command
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if "starting" in line and any("ServeReplica" in " ".join(child.cmdline()) for child in _children(process)):
                break
        assert any("train: already done" in line for line in said), "".join(said)
        started = _children(process)
        process.send_signal(sent)
        said.append(process.stderr.read())
        assert process.wait(60) == 130, "".join(said)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
