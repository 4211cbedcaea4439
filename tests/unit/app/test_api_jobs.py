"""Jobs of the fine-tuning API, in the real queue: what waits there, ends, goes on, and what is told of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_ray.app import jobs as queue
from llm_ray.app.api_service import ApiService, open_service
from llm_ray.conf.serve import FinetuningApi
from llm_ray.serve.gateway.finetuning.service import Asked, Job, Named, Problem
from tests.runs import conf_of, large_model, opened_run
from tests.waiting import until

ROW = '{"prompt": "Who?", "completion": "Me."}\n'


class Client:
    """One who has files and jobs."""

    def __init__(self, service: ApiService, name: str | None) -> None:
        self.service, self.name, self.owner = service, name, service.owner_of(name)
        upload = service.begin(self.owner)
        upload.path.write_text(ROW * 3)
        self.file = service.keep(self.owner, upload, "rows.jsonl", None).id

    def create(self, model: str = "base", named: Named | None = None, **asked: Any) -> Job:
        return self.service.create(
            self.owner, self.name, Asked(model, asked.pop("training_file", self.file), **asked), named, any_model=True
        )

    def job(self, job: Job) -> Job:
        return self.service.job(self.owner, job.id)

    def told(self, job: Job) -> list[str]:
        return [event.message for event in self.service.events(self.owner, job.id)]


@pytest.fixture
def home(tmp_path: Path, smollm2: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(smollm2)
    return tmp_path


@pytest.fixture
def service(home: Path) -> Iterator[ApiService]:
    """While a run of the command line is at work, so that jobs wait; in the end none is left."""
    (rows := home / "rows.jsonl").write_text(ROW)
    conf = conf_of(home, "busy", rows)
    with opened_run(conf, force=False):
        yield open_service(home, FinetuningApi(enabled=True, max_jobs=3))
        for job in queue.queue(home / "runs"):
            queue.cancel(home / "runs", job.name)
        until(lambda: not processes(home))


def processes(home: Path) -> dict[str, psutil.Process]:
    """Those of jobs, by their runs; a process that has just begun is still this one's child and not among them."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ends just now
            command = process.cmdline()
            if command[3:5] == ["llm_ray.cli.job", str(home / "runs")] and process.ppid() != psutil.Process().pid:
                found[command[5]] = process
    return found


def test_jobs_wait_in_order_within_a_limit_and_belong_to_who_asked(service: ApiService, home: Path) -> None:
    alice, bob = Client(service, "alice"), Client(service, "bob")
    first = alice.create(suffix="bot", metadata={"team": "support"})
    second = bob.create()
    third = alice.create()
    assert (first.state, first.fine_tuned_model, first.run) == ("queued", None, f"ft-bot-{first.id[6:]}")
    assert [job.name for job in queue.queue(home / "runs")] == [first.run, second.run, third.run]
    assert [job.by for job in queue.queue(home / "runs")][:2] == ["alice (API)", "bob (API)"]
    for stranger, job in ((bob, first), (alice, second), (Client(service, None), first)):
        for asked in (service.job, service.events, service.checkpoints, service.cancel, service.pause, service.resume):
            with pytest.raises(Problem) as caught:
                asked(stranger.owner, job.id)
            assert caught.value.status == 404
    with pytest.raises(Problem) as caught:
        alice.create(training_file=bob.file)
    assert (caught.value.status, caught.value.param) == (404, "training_file")
    alice.create()
    counted = time.monotonic()
    for _ in range(500):
        with pytest.raises(Problem) as caught:
            alice.create()
        assert (caught.value.status, caught.value.code) == (429, "too_many_jobs")
    assert time.monotonic() - counted < 120
    assert len(queue.queue(home / "runs")) == 4
    with pytest.raises(Problem, match="learns from the file"):
        service.delete_file(alice.owner, alice.file)
    assert [job.id for job in service.jobs(bob.owner)] == [second.id]


def test_a_job_is_paused_resumed_and_cancelled_while_it_waits(service: ApiService, home: Path) -> None:
    alice = Client(service, "alice")
    job = alice.create()
    assert service.pause(alice.owner, job.id).state == "queued"
    assert queue.queue(home / "runs") == []
    service.recover()
    assert queue.queue(home / "runs") == [], "a paused one is left alone"
    until(lambda: not processes(home))

    def resumed() -> bool:  # its process may not have begun yet, and ends only then
        try:
            return service.resume(alice.owner, job.id).state == "queued"
        except Problem as problem:
            assert problem.status == 503
            return False

    until(resumed)
    assert len(queue.queue(home / "runs")) == 1
    ended = service.cancel(alice.owner, job.id)
    assert ended.state == "cancelled"
    assert ended.finished
    service.recover()
    assert queue.queue(home / "runs") == []
    for again in (service.cancel, service.pause, service.resume):
        with pytest.raises(Problem) as caught:
            again(alice.owner, job.id)
        assert caught.value.status == 400
    assert alice.told(job) == [
        f"Created fine-tuning job: {job.id}",
        "The job was paused: it waits until it is resumed",
        "The job goes on",
        "The job was cancelled",
    ]
    service.delete_file(alice.owner, alice.file)


def test_one_whose_process_was_killed_goes_on_in_its_place(service: ApiService, home: Path) -> None:
    alice = Client(service, "alice")
    first, second = alice.create(), alice.create()
    until(lambda: first.run in processes(home))  # Ray would end a child with its parent
    processes(home)[first.run].kill()
    until(lambda: queue.queue(home / "runs")[0].killed)
    assert alice.job(first).state == "queued"
    open_service(home, FinetuningApi(enabled=True)).recover()  # another process's, after this one was killed
    waiting = queue.queue(home / "runs")
    assert [(job.name, job.state) for job in waiting] == [(first.run, "waiting"), (second.run, "waiting")]
    assert "The job's process was ended from outside: it goes on" in alice.told(first)
    queue.cancel(home / "runs", second.run)  # by the page
    assert alice.job(second).state == "cancelled"
    third, _ = alice.create(), alice.create()
    with pytest.raises(Problem, match="as many as you may"):
        service.resume(alice.owner, second.id)
    service.cancel(alice.owner, third.id)
    until(lambda: second.run not in processes(home))  # until then it is 503
    assert service.resume(alice.owner, second.id).state == "queued"
    queue.cancel(home / "runs", second.run)
    service.recover()
    assert first.run in {job.name for job in queue.queue(home / "runs")}
    assert second.run not in {job.name for job in queue.queue(home / "runs")}


def test_what_a_run_comes_to_is_what_its_job_comes_to(service: ApiService, home: Path) -> None:
    alice = Client(service, "alice")
    job = alice.create(suffix="bot")
    queue.cancel(home / "runs", job.run)
    run = home / "runs" / job.run
    run.mkdir()

    def after(seconds: int) -> str:
        return datetime.fromtimestamp(job.created + seconds, UTC).isoformat()

    def stands(**lineage: Any) -> Job:
        (run / "run.json").write_text(json.dumps({"created": after(1)} | lineage))
        return alice.job(job)

    at = after(60)
    rows = home / "finetuning" / alice.owner / "files" / alice.file / "rows.jsonl"
    failed = stands(state="failed", reason=f"{rows}:3: broken, see {home}/runs", updated=at)
    assert (failed.state, failed.error) == ("failed", f"{alice.file}:3: broken, see LLM_RAY_HOME/runs")
    assert alice.told(job)[-1].startswith("The job failed: file-")
    assert stands(state="running", updated=at).state == "queued", "its process is gone: it goes on"
    assert stands(state="stopped", updated=at).state == "cancelled"
    assert stands(state="done", updated=at).state == "queued", "killed before its model was served"
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "validation_loss": 2.0}\n'
        '{"step": 1, "total_steps": 2, "loss": 1.5, "seconds": 2.0}\n'
        '{"step": 2, "total_steps": 2, "loss": 1.25, "validation_loss": 1.0, "seconds": 2.0}\n'
    )
    (run / "result.json").write_text('{"training": {"tokens": 321}}')
    name = f"ft:base:bot:{job.id[6:]}"
    done = stands(
        state="done",
        updated=at,
        stages={"train": {"finished": after(30), "seconds": 20.0}},
        served={"name": name, "served": True, "how": "as a model of its own", "at": at},
    )
    assert (done.state, done.fine_tuned_model, done.trained_tokens) == ("succeeded", name, 321)
    assert alice.told(job) == [
        f"Created fine-tuning job: {job.id}",
        "Fine-tuning job started",
        "Step 0: validation loss=2.0000",
        "Step 1/2: training loss=1.5000",
        "Step 2/2: training loss=1.2500, validation loss=1.0000",
        "train: done in 20 s",
        f"New fine-tuned model created: {name}, served as a model of its own",
    ]
    assert service.may_ask(alice.owner, name) is True
    assert service.may_ask(service.owner_of("bob"), name) is False
    assert service.may_ask(service.owner_of(None), name) is False
    assert service.may_ask(alice.owner, "ft:base:bot:ffffffffffff") is None
    service.recover()
    run.rename(home / "deleted")
    assert (alice.job(job).state, alice.job(job).fine_tuned_model) == ("succeeded", name)
    (home / "deleted").rename(run)
    (run / "output").symlink_to(home / "models" / "base")
    again = alice.create(model=name, named=Named(name, run / "output", True, False), suffix="two")
    assert alice.service._jobs(alice.owner)._record(again.id).model == f"ft:base:two:{again.id[6:]}"
    stored = (home / "finetuning" / alice.owner / "jobs" / again.id / "conf.yaml").read_text()
    assert f"base: {job.run}\n" in stored


def test_the_model_of_a_job_is_deleted_by_its_owner_or_an_admin_and_its_run_stays(
    service: ApiService, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, taken = Client(service, "alice"), list[str]()
    monkeypatch.setattr(ApiService, "_stop", lambda self, model: taken.append(model))
    jobs = [alice.create(suffix="bot") for _ in range(2)]
    names = [f"ft:base:bot:{job.id[6:]}" for job in jobs]
    for job in jobs:
        (home / "runs" / job.run / "output").mkdir(parents=True)
    bob = service.owner_of("bob")
    for owner, name in ((bob, names[0]), (alice.owner, "base"), (alice.owner, "ft:base:bot:ffffffffffff")):
        with pytest.raises(Problem, match="There is no model") as caught:
            service.delete_model(owner, name, served=True, any_owner=False)
        assert caught.value.status == 404
    assert taken == []
    kept = service.delete_model(alice.owner, names[0], served=True, any_owner=False)
    assert f"llm-ray runs delete {jobs[0].run}" in kept
    assert (home / "runs" / jobs[0].run / "output").is_dir()
    service.delete_model(bob, names[1], served=False, any_owner=True)
    assert taken == [names[0]]
    assert alice.told(jobs[0])[-1] == f"The model {names[0]} was deleted"
    with pytest.raises(Problem):
        service.delete_model(alice.owner, names[0], served=False, any_owner=False)
    with pytest.raises(Problem, match="there is no"):
        alice.create(model=names[0])


@pytest.mark.parametrize(
    "model", ["../models/base", "nothing", "..", ".", "", "busy", "rows.jsonl", "ft:a:b:ffffffffffff"]
)
def test_a_model_is_one_of_the_registry_or_served(service: ApiService, home: Path, model: str) -> None:
    with pytest.raises(Problem) as caught:
        Client(service, "alice").create(model)
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_models_that_cannot_be_trained(service: ApiService, home: Path) -> None:
    alice = Client(service, "alice")
    for named in (Named("x", home / "x", True, False), Named("x", home / "x", False, True)):
        with pytest.raises(Problem) as caught:
            alice.create("x", named)
        assert (caught.value.status, caught.value.code) == (400, "invalid_model")


def test_what_can_never_fit_is_refused_with_the_figures(service: ApiService, home: Path) -> None:
    large_model(home / "models" / "large", billions=200)
    alice = Client(service, "alice")
    with pytest.raises(Problem, match=r"at least .* GiB of memory, and this host has .*200.00 billion") as caught:
        alice.create("large")
    assert caught.value.status == 400
    with pytest.raises(Problem, match=r"runtime\.workers"):
        alice.create(conf={"runtime.workers": 999})
    assert service.jobs(alice.owner) == []


def test_a_text_cannot_leave_the_conf_for_a_template(service: ApiService, home: Path) -> None:
    """Its conf is a template when it is read again, which may ask for the environment."""
    alice = Client(service, "alice")
    with pytest.raises(Problem, match="endraw"):
        alice.create(conf={"data": {"system": "{% endraw %}{{ env.HOME }}"}})
    assert service.jobs(alice.owner) == []
    kept = alice.create(conf={"data": {"system": "{{ env.HOME }} {% raw %}"}})
    assert "{{ env.HOME }}" in (home / "runs" / ".queue" / f"{kept.run}.yaml").read_text()
