"""Finetunes in the background: real ones, of the stage prepare alone, in processes of their own."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llm_ray.app import job_queue, jobs
from llm_ray.app.confs import conf_of
from llm_ray.app.job_queue import LOG
from llm_ray.app.runs import list_runs
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import ClusterError, ConfError, RunError
from tests.runs import large_model, opened_run
from tests.waiting import until


@pytest.fixture
def conf(tmp_path: Path, smollm2: Path) -> Callable[..., FinetuneConf]:
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}\n' * 3)

    def made(name: str, **settings: str) -> FinetuneConf:
        given = {"train": str(rows), "model": str(smollm2), "name": name, "stages": "[prepare]"}
        return conf_of(given | settings, tmp_path)

    return made


@contextlib.contextmanager
def at_work(conf: FinetuneConf) -> Iterator[None]:
    """A run that this process works in."""
    with opened_run(conf, force=False):
        yield


def states(runs: Path) -> dict[str, str]:
    return {job.name: job.state for job in jobs.queue(runs)}


def test_they_wait_for_what_runs_can_be_cancelled_and_run(conf: Callable[..., FinetuneConf]) -> None:
    runs = conf("first").paths.runs
    with at_work(conf("busy")):  # of the command line
        first = jobs.submit(conf("first"), by="alice", command="llm-ray finetune --config lora --set 'name=first'")
        second = jobs.submit(conf("second"), by="bob")
        assert (first.state, first.ahead, first.by) == ("waiting", 0, "alice")
        assert (second.state, second.ahead) == ("waiting", 1)
        with pytest.raises(RunError, match="first is already waiting or running"):
            jobs.submit(conf("first"))
        with pytest.raises(RunError, match="is active"):
            jobs.submit(conf("busy"))
        jobs.cancel(runs, "second")
        assert states(runs) == {"first": "waiting"}
        with pytest.raises(RunError, match="second is not in the queue"):
            jobs.cancel(runs, "second")
    until(lambda: states(runs) == {})
    found = {run.name: run.state for run in list_runs(runs)}
    assert found == {"busy": "done", "first": "done"}
    assert "prepare: done in" in jobs.read_log(runs, "first")
    assert (runs / "first" / LOG).is_file()
    assert "llm-ray finetune --config lora --set name=first" in (runs / "first" / "run.json").read_text()
    with pytest.raises(RunError, match="with a different conf"):
        jobs.submit(conf("first", **{"data.max_length": "64"}))


def test_everybodys_first_goes_before_somebodys_second_and_urgent_ones_before_all(
    conf: Callable[..., FinetuneConf], tmp_path: Path
) -> None:
    runs = conf("first").paths.runs

    def order() -> list[str]:
        return [job.name for job in jobs.queue(runs)]

    with at_work(conf("busy")):
        for name, by in (
            ("a1", "alice"),
            ("a2", "alice"),
            ("a3", "alice"),
            ("b1", "bob"),
            ("b2", "bob"),
            ("c1", "carol"),
        ):
            jobs.submit(conf(name), by=by)
        assert order() == ["a1", "b1", "c1", "a2", "b2", "a3"]
        assert [job.ahead for job in jobs.queue(runs)] == [0, 1, 2, 3, 4, 5]
        jobs.submit(conf("now"), by="alice", service=jobs.Service("", tmp_path, time.time_ns(), urgent=True))
        assert order() == ["now", "a1", "b1", "c1", "a2", "b2", "a3"]
        for name in order()[1:3]:
            jobs.cancel(runs, name)
        assert order() == ["now", "a2", "b2", "c1", "a3"], "what is gone counts no more"
        for name in ("a2", "a3", "b2"):
            jobs.cancel(runs, name)
    until(lambda: states(runs) == {})
    began = {run.name: run.created for run in list_runs(runs)}
    assert began["now"] < began["c1"]


def test_one_that_fails_before_there_is_a_run_says_why(conf: Callable[..., FinetuneConf], tmp_path: Path) -> None:
    made = conf("lost")
    runs = made.paths.runs
    with at_work(conf("busy")):
        jobs.submit(made)
        (tmp_path / "rows.jsonl").unlink()
    until(lambda: states(runs) == {"lost": "failed"})
    (job,) = jobs.queue(runs)
    assert "no such file" in job.reason
    assert not (runs / "lost").exists()
    jobs.cancel(runs, "lost")
    assert jobs.queue(runs) == []


def test_one_that_fails_leaves_what_was_in_its_folder(conf: Callable[..., FinetuneConf], tmp_path: Path) -> None:
    asked = conf("mine")
    notes = asked.run_dir / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("kept")
    (tmp_path / "rows.jsonl").unlink()
    jobs.submit(asked)
    until(lambda: states(asked.paths.runs) == {"mine": "failed"})
    assert [file.name for file in asked.run_dir.iterdir()] == ["notes.txt"]


def test_a_killed_one_is_told_from_one_that_waits(conf: Callable[..., FinetuneConf]) -> None:
    made = conf("killed")
    with at_work(conf("busy")):
        jobs.submit(made)
        _kill(made.paths.runs, "killed")
        until(lambda: states(made.paths.runs) == {"killed": "failed"})
        assert "start it again" in jobs.queue(made.paths.runs)[0].reason
        assert jobs.submit(made).state == "waiting"
        jobs.cancel(made.paths.runs, "killed")


def test_after_a_restart_of_the_machine_jobs_go_on_in_their_places(
    conf: Callable[..., FinetuneConf], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = conf("ran").paths.runs
    with at_work(conf("busy")):
        for name in ("ran", "first", "second", "mine"):
            jobs.submit(conf(name), by="alice")
        jobs.submit(conf("service"), service=jobs.Service("", tmp_path, time.time_ns()))
        with opened_run(conf("ran"), force=False) as ran:  # it was at work
            job_queue.write_entry(
                runs / ".queue", "ran", replace(job_queue.entries(runs / ".queue")["ran"], started=True)
            )
            _kill(runs, "ran")
        ran.set_state("running")
        _kill(runs, "first")
        _kill(runs, "second")
        until(lambda: list(states(runs).values()).count("failed") == 2)
        assert jobs.recover(runs) == [], "they were killed, and the machine goes on"
        (restarted := tmp_path / "boot_id").write_text("another\n")
        monkeypatch.setattr(job_queue, "_BOOT_ID", restarted)
        until(lambda: not job_queue.is_held(runs / ".queue", "ran"))
        assert jobs.recover(runs) == ["ran", "first", "second"], "what lives, and a service's, stays as it is"
        assert [job.name for job in jobs.queue(runs) if job.by] == ["ran", "first", "second", "mine"]
        assert jobs.recover(runs) == [], "they are at work"
        jobs.cancel(runs, "service")
    until(lambda: states(runs) == {})
    assert {run.name: run.state for run in list_runs(runs)} == dict.fromkeys(
        ["busy", "ran", "first", "second", "mine"], "done"
    )


def test_what_the_command_line_has_gone_on_with_is_not_begun_again(
    conf: Callable[..., FinetuneConf], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = conf("ran").paths.runs
    with at_work(conf("busy")):
        jobs.submit(conf("ran"))
        entry = job_queue.entries(runs / ".queue")["ran"]
        _kill(runs, "ran")
    until(lambda: not job_queue.is_held(runs / ".queue", "ran"))
    with at_work(conf("ran")):
        pass
    job_queue.write_entry(runs / ".queue", "ran", replace(entry, started=True, boot=f"{entry.boot.split()[0]} before"))
    assert jobs.recover(runs) == []
    assert job_queue.entries(runs / ".queue") == {}


def test_what_can_never_fit_is_refused_before_it_waits(conf: Callable[..., FinetuneConf], tmp_path: Path) -> None:
    large = large_model(tmp_path / "large", billions=200)
    asked = conf("large", model=str(large), stages="[prepare,train]")
    with pytest.raises(ConfError, match=r"large needs at least .* GiB of memory, and this host has") as caught:
        jobs.submit(asked)
    assert "200.00 billion parameters" in str(caught.value)
    assert "training.strategy fsdp" in str(caught.value)
    wide = conf("wide", stages="[prepare,train]", **{"runtime.workers": "999"})
    with pytest.raises(ClusterError, match=r"runtime\.workers"):
        jobs.submit(wide)
    assert jobs.queue(asked.paths.runs) == []
    assert not asked.run_dir.exists()


def test_looking_at_the_queue_disturbs_nobody(conf: Callable[..., FinetuneConf]) -> None:
    made = conf("looked-at")
    with at_work(conf("busy")):
        (folder := made.paths.runs / ".queue").mkdir(parents=True, exist_ok=True)
        with (folder / "looked-at.lock").open("ab") as looking:
            fcntl.flock(looking, fcntl.LOCK_SH)  # for longer than anybody looks
            with pytest.raises(RunError, match="waiting or running"):
                jobs.submit(made)
        assert jobs.submit(made).state == "waiting"
        jobs.cancel(made.paths.runs, "looked-at")


def _kill(runs: Path, name: str) -> None:
    import psutil

    def matches(process: psutil.Process) -> bool:
        try:
            return process.cmdline()[-3:-1] == [str(runs), name]
        except psutil.Error:  # one of another test that has just ended
            return False

    def found() -> list[psutil.Process]:
        return list(filter(matches, psutil.Process().children()))

    until(found)  # its command line is there a moment after it
    found()[0].kill()
