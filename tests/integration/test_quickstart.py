"""The quickstart as a newcomer runs it: once the whole way, then again broken off in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

COMMAND = str(Path(sys.executable).with_name("llm-ray"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.timeout(1800)
def test_the_finetuned_model_knows_what_the_base_model_cannot(home: Path) -> None:
    done = subprocess.run([COMMAND, "quickstart", "--home", str(home)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = home / "runs" / "quickstart"
    report = json.loads((run / "quickstart.json").read_text())
    assert report["base"]["of"] == report["finetuned"]["of"] == 30
    assert report["base"]["right"] <= 1
    assert report["finetuned"]["right"] >= 0.85 * 30
    assert set(report["seconds"]) == {"model", "finetune", "deploy", "ask", "total"}
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert sum(answer["finetuned"]["right"] for answer in answers) == report["finetuned"]["right"]
    assert all(answer["base"]["answer"] for answer in answers)
    assert str(run) in done.stdout
    assert (home / "models" / "smollm2-135m-instruct" / "config.json").is_file()


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_second_run_skips_what_is_done_and_stops_all_when_told_to(home: Path, sent: signal.Signals) -> None:
    with subprocess.Popen(
        [COMMAND, "quickstart", "--home", str(home)], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
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
