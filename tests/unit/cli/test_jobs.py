"""`llm-ray jobs`: real jobs of the stage prepare alone, as a person on the machine sees them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llm_ray.app import job_queue
from llm_ray.app.confs import conf_of
from llm_ray.cli.main import cli
from llm_ray.conf.load import dump
from tests.runs import opened_run
from tests.waiting import until

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))

    def command(*words: str) -> Result:
        return CliRunner().invoke(cli, ["jobs", *words])

    return command


@pytest.fixture
def asked(tmp_path: Path, smollm2: Path) -> dict[str, str]:
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}\n' * 3)
    return {"train": str(rows), "model": str(smollm2), "stages": "[prepare]"}


@pytest.fixture
def submit(run: Run, asked: dict[str, str]) -> Run:
    def of(name: str, *more: str) -> Result:
        settings = [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
        return run("submit", "--config", "lora", *settings, "--set", f"name={name}", *more)

    return of


def states(run: Run) -> dict[str, str]:
    return {job["name"]: job["state"] for job in json.loads(run("list", "--json").stdout)}


def test_from_the_queue_to_the_end(run: Run, submit: Run, asked: dict[str, str], tmp_path: Path) -> None:
    assert "no jobs in" in run("list").output
    with opened_run(conf_of(asked | {"name": "busy"}, tmp_path), force=False):  # of the command line
        first = submit("first")
        assert first.exit_code == 0, first.output
        assert first.stdout == "first: waiting\n"
        assert submit("second").stdout == "second: waiting, after 1 other\n"
        assert json.loads(submit("third", "--json").stdout)["ahead"] == 2
        again = submit("first")
        assert again.exit_code == 1 and "first is already waiting or running" in again.output
        assert states(run) == {"first": "waiting", "second": "waiting", "third": "waiting"}
        lines = run("list").stdout.splitlines()
        assert lines[0].split() == ["name", "state", "ahead", "by", "age", "reason"]
        assert run("show", "second").stdout.startswith("second: waiting, after 1 other\nsubmitted ")
        assert run("cancel", "second").stdout == "second: taken out of the queue\n"
        assert run("cancel", "third").exit_code == 0
        lost = run("cancel", "second")
        assert lost.exit_code == 1 and "no job second" in lost.output
    followed = run("follow", "first")
    assert followed.exit_code == 0, followed.output
    assert "prepare: done in" in followed.stdout
    assert followed.stderr == "first: done\n"
    assert states(run) == {"first": "done"}, "the run of the command line is no job"
    assert "prepare: done in" in run("show", "first").stdout
    ended = run("cancel", "first")
    assert ended.exit_code == 1 and "the job first is done: there is nothing to cancel" in ended.output
    again = run("resume", "first")
    assert again.exit_code == 0, again.output
    assert run("follow", "first").exit_code == 0
    command = json.loads((tmp_path / "runs" / "first" / "run.json").read_text())["command"]
    assert command.startswith("llm-ray finetune --config ")


def test_one_that_fails_says_why(run: Run, submit: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    submit("broken")
    end = time.monotonic() + 120
    while states(run).get("broken") != "failed":
        assert time.monotonic() < end
        time.sleep(0.1)
    followed = run("follow", "broken")
    assert followed.exit_code == 1
    assert "broken: failed. " in followed.stderr and "rows.jsonl:1: broken JSON" in followed.stderr


@pytest.mark.parametrize("command", ["show", "follow", "cancel", "resume"])
def test_a_job_that_is_not_there(run: Run, command: str) -> None:
    result = run(command, "nothing")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: no {'run' if command == 'resume' else 'job'} nothing")


def test_a_conf_that_is_wrong_comes_to_no_queue(run: Run, submit: Run) -> None:
    result = submit("wrong", "--set", "training.epoch=3")
    assert result.exit_code == 2 and "training.epoch" in result.output
    assert states(run) == {}


def test_those_that_a_restart_has_ended_go_on(run: Run, submit: Run, asked: dict[str, str], tmp_path: Path) -> None:
    assert run("recover").output == "no job was interrupted by a restart of this machine\n"
    with opened_run(conf_of(asked | {"name": "busy"}, tmp_path), force=False):
        submit("first")
        folder = tmp_path / "runs" / ".queue"
        entry = job_queue.entries(folder)["first"]
        run("cancel", "first")  # its process ends; what is left is as after a restart
        until(lambda: not job_queue.is_held(folder, "first"))
        (folder / "first.yaml").write_text(dump(conf_of(asked | {"name": "first"}, tmp_path)))
        job_queue.write_entry(folder, "first", replace(entry, boot=f"{entry.boot.split()[0]} before"))
        assert states(run) == {"first": "failed"}
        assert run("recover").output == "continued: first\n"
        assert states(run) == {"first": "waiting"}
    assert run("follow", "first").stderr == "first: done\n"
