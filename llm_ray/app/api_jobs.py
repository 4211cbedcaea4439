"""Jobs of the fine-tuning API: finetunes in the queue of `llm_ray.app.jobs`, each owned by a client.

A job is a folder, `ftjob-…`, with `job.json` (the request, its owner and what was decided about it) and the conf of its
run. The job's state is not stored until it has ended: it is derived from the queue and the run's folder. So jobs
survive the gateway's process, and `recover` restarts those whose own process was killed.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_ray.app import jobs
from llm_ray.app.api_conf import conf_of
from llm_ray.app.api_files import Files
from llm_ray.app.runs import seconds_left
from llm_ray.conf.finetune import STAGES, FinetuneConf
from llm_ray.conf.load import dump
from llm_ray.conf.section import Paths
from llm_ray.conf.serve import FinetuningApi
from llm_ray.errors import LlmRayError, RunError
from llm_ray.files import locked, write_text
from llm_ray.runs.folder import CONF, RunFolder, ask_to_stop, holder, stored_conf
from llm_ray.runs.metrics import METRICS, read_metrics
from llm_ray.serve.gateway.finetuning.service import (
    PREFIX,
    Asked,
    Checkpoint,
    Event,
    Job,
    Level,
    Named,
    Problem,
    State,
)

_ID = re.compile(r"ftjob-[0-9a-f]{12}")
_RECORD = "job.json"
_STILL_ENDING = "The job `{}` is still ending what it did: resume it in a moment."
_STARTS = 3
"""How often a killed job is restarted."""


@dataclass(frozen=True)
class Record:
    """The persistent record of a job, apart from its run."""

    id: str
    created: int
    arrived: int
    """Creation time in nanoseconds since 1970: the job's position in the queue."""
    by: str
    """The name shown as the one who submitted the job."""
    asked: Asked
    run: str
    base: str
    """The base model's label, which becomes part of the new model's name."""
    seed: int
    urgent: bool = False
    """Whether the job goes ahead of those that are not urgent."""
    submitted: bool = False
    """Whether the job has been put into the queue."""
    cancelled: int | None = None
    paused: int | None = None
    ended: State | None = None
    """The final state, once nothing remains to be done: from then on the run may be deleted."""
    finished: int | None = None
    killed: int = 0
    """How often its process was killed."""
    deleted: int | None = None
    """When its model was deleted."""
    notes: tuple[tuple[int, Level, str], ...] = ()
    """Events that the run does not record: time, level and text."""

    @property
    def model(self) -> str:
        """Returns the name of the model that the job makes."""
        return f"{PREFIX}{self.base}:{self.asked.suffix or ''}:{self.id.removeprefix('ftjob-')}"


@dataclass(frozen=True)
class _Standing:
    """The current state of a job. `alive`: it has a process; `lost`: its process was killed and it can be restarted."""

    state: State
    error: str = ""
    finished: int | None = None
    lost: bool = False
    alive: bool = False


class Jobs:
    """The jobs of one owner, stored in the folder `place`."""

    def __init__(self, place: Path, home: Path, files: Files, settings: FinetuningApi) -> None:
        self._place, self._home, self._files, self._settings = place, home, files, settings
        self._paths = Paths.of(home)
        self._runs = self._paths.runs

    def create(self, asked: Asked, by: str, named: Named | None, *, any_model: bool, urgent: bool = False) -> Job:
        """Queues a job, ahead of others if `urgent`. Raises Problem if the request is invalid or the owner has too many
        jobs."""
        train = self._files.get(asked.training_file, "training_file")
        held_out = self._files.get(asked.validation_file, "validation_file") if asked.validation_file else None
        base, label = self._base(asked.model, named, any_model)
        id = f"ftjob-{secrets.token_hex(6)}"
        run = f"ft-{(asked.suffix or label.rpartition('/')[2])[:40]}-{id.removeprefix('ftjob-')}"
        conf = conf_of(
            asked,
            run=run,
            base=base,
            paths=self._paths,
            train=self._files.path(train),
            form=train.format,
            rows=train.rows,
            validation=self._files.path(held_out) if held_out else None,
            validation_form=held_out.format if held_out else None,
        )
        now = time.time_ns()
        record = Record(id, now // 10**9, now, by, asked, run, label, conf.training.seed, urgent)
        for folder in (self._place.parent.parent, self._place.parent, self._place):
            folder.mkdir(exist_ok=True, mode=0o700, parents=True)
        with self._changing():
            self._check_room()
            with self._told(record):
                folder = self._place / f".{id}"
                folder.mkdir(mode=0o700)
                write_text(folder / CONF, dump(conf), mode=0o600)
                self._write(record, folder)
                folder.rename(self._place / id)
                try:
                    self._submit(record, conf)
                except LlmRayError:
                    shutil.rmtree(self._place / id, ignore_errors=True)
                    raise
        return self.get(id)

    def all(self) -> list[Job]:
        """Returns all jobs, oldest first."""
        queue = self._queue()
        return [self._job(record, queue.get(record.run)) for record in self._records()]

    def get(self, id: str) -> Job:
        """Returns the job `id`. Raises Problem if it does not exist."""
        record = self._record(id)
        return self._job(record, self._queue().get(record.run))

    def cancel(self, id: str) -> Job:
        """Ends a job for good. Raises Problem if it has already ended."""
        return self._end(id, "cancelled", "The job was cancelled")

    def pause(self, id: str) -> Job:
        """Pauses a job at its next checkpoint. Raises Problem if it has already ended."""
        return self._end(id, "paused", "The job was paused: it waits until it is resumed")

    def resume(self, id: str) -> Job:
        """Resumes a paused, stopped or failed job. Raises Problem if it is in another state or its process is still
        ending."""
        with self._changing():
            record = self._record(id)
            standing = self._standing(record, self._queue().get(record.run))
            if record.cancelled or not (record.paused or standing.state in ("failed", "cancelled")):
                raise Problem(400, f"The job `{id}` is {standing.state}: only one that is paused or failed can go on.")
            if standing.alive:
                raise Problem(503, _STILL_ENDING.format(id), "still_ending")
            if not record.paused:
                self._check_room()
            again = _noted(replace(record, paused=None, ended=None, finished=None, killed=0), "info", "The job goes on")
            with self._told(record):
                self._submit(again, self._conf(record))
        return self.get(id)

    def delete_model(self, model: str, stop: Callable[[str], None] | None) -> str:
        """Deletes a job's model; `stop` undeploys it if it is served. Returns a message about what remains. Raises
        Problem if there is no such model."""
        record = self._made(model)
        if record is None:
            raise Problem(404, f"There is no model `{model[:100]}` that a job of yours has made.", "model_not_found")
        if stop:
            stop(model)
        with self._changing():
            deleted = replace(self._record(record.id), deleted=int(time.time()))
            self._write(_noted(deleted, "info", f"The model {model} was deleted"))
        return (
            f"The run {record.run} with its checkpoints and model stays on the machine: llm-ray runs delete {record.run} "
            "deletes it as well"
        )

    def recover(self) -> None:
        """Restarts jobs whose processes were killed, and ends cancelled and paused ones whose processes still run."""
        with self._changing():
            queue = self._queue()
            for record in self._records():
                if record.ended:
                    continue
                standing = self._standing(record, queue.get(record.run))
                if record.cancelled or record.paused:
                    self._make_end(record, queue.get(record.run))
                elif standing.lost:
                    with contextlib.suppress(LlmRayError):  # retried at the next call
                        again = replace(record, killed=record.killed + record.submitted)
                        if record.submitted:
                            again = _noted(again, "warn", "The job's process was ended from outside: it goes on")
                        self._submit(again, self._conf(record))
                if standing.state in ("succeeded", "failed", "cancelled") and not standing.alive:
                    self._write(replace(record, ended=standing.state, finished=standing.finished))

    def events(self, id: str) -> list[Event]:
        """Returns the events of a job, oldest first. Raises Problem if there is no such job."""
        record = self._record(id)
        standing = self._standing(record, self._queue().get(record.run))
        told: list[tuple[int, str, Level, str, dict[str, float | int] | None]] = [
            (record.created, "created", "info", f"Created fine-tuning job: {id}", None)
        ]
        told += [(at, f"note{n}", level, text, None) for n, (at, level, text) in enumerate(record.notes)]
        told += self._of_run(record)
        if standing.state == "failed":
            told.append(
                (standing.finished or record.created, "failed", "error", f"The job failed: {standing.error}", None)
            )
        told.sort(key=lambda one: one[0])  # stable: events of the same second keep their order
        stem = id.removeprefix("ftjob-")
        return [Event(f"ftevent-{stem}-{kind}", at, level, text, data) for at, kind, level, text, data in told]

    def checkpoints(self, id: str) -> list[Checkpoint]:
        """Returns the checkpoints in the job's run, oldest first. Raises Problem if there is no such job."""
        from llm_ray.train.checkpoint import list_checkpoints, step_of

        record = self._record(id)
        rows = read_metrics(self._runs / record.run / METRICS)
        found = []
        for path in list_checkpoints(self._runs / record.run / "checkpoint"):
            step = step_of(path)
            row = next((row for row in rows if row["step"] == step), {})
            with contextlib.suppress(OSError):  # meanwhile replaced by a newer checkpoint
                found.append(
                    Checkpoint(
                        f"ftckpt-{id.removeprefix('ftjob-')}-{step}",
                        int((path / ".metadata").stat().st_mtime),
                        step,
                        f"{record.model}:ckpt-step-{step}",
                        {"step": step, **_losses(row)},
                    )
                )
        return found

    def uses(self, file: str) -> str | None:
        """Returns the id of a queued or running job that uses the file, else None."""
        return next(
            (
                job.id
                for job in self.all()
                if file in (job.asked.training_file, job.asked.validation_file) and job.state in ("queued", "running")
            ),
            None,
        )

    def _check_room(self) -> None:
        """Raises Problem if the owner has reached the limit of jobs."""
        if len([job for job in self.all() if job.state in ("queued", "running")]) >= self._settings.max_jobs:
            raise Problem(
                429,
                f"You have {self._settings.max_jobs} jobs that wait or run, as many as you may: wait for one, or cancel it.",
                "too_many_jobs",
            )

    # State of a job ---------------------------------------------------------------------------------------------------

    def _queue(self) -> dict[str, jobs.Job]:
        return {job.name: job for job in jobs.queue(self._runs)} if self._runs.is_dir() else {}

    def _standing(self, record: Record, queued: jobs.Job | None) -> _Standing:
        alive = queued is not None and queued.state != "failed"
        try:
            lineage = RunFolder(self._runs / record.run).lineage()
        except RunError as error:
            return _Standing("failed", self._words(str(error), record), record.created, alive=alive)
        at = _seconds(lineage.get("updated")) or record.created
        if record.cancelled:
            return _Standing("cancelled", finished=record.cancelled, alive=alive)
        if lineage.get("state") == "done" and "served" in lineage and not alive:  # also if the pause came too late
            return _Standing("succeeded", finished=_seconds(lineage["served"]["at"]))
        if record.paused:
            return _Standing("queued", alive=alive)
        if queued and alive:
            return _Standing("queued" if queued.state == "waiting" else "running", alive=True)
        if queued and not queued.killed:  # it failed before its run began
            return _Standing("failed", self._words(queued.reason, record), _seconds(queued.since))
        state = lineage.get("state")
        if state == "failed":
            return _Standing("failed", self._words(lineage.get("reason", ""), record), at)
        if state == "stopped":
            return _Standing("cancelled", finished=at)  # stopped on the machine
        if not queued and state is None and record.submitted:
            return _Standing(record.ended or "cancelled", finished=record.finished or record.created)  # left the queue
        if state == "running" and holder(self._runs / record.run) is not None:
            return _Standing("running", alive=True)  # resumed by a command on the machine
        if record.killed >= _STARTS:
            return _Standing("failed", f"its process was ended from outside {record.killed + 1} times", at)
        return _Standing("queued", lost=True)

    def _job(self, record: Record, queued: jobs.Job | None) -> Job:
        standing = self._standing(record, queued)
        run = self._runs / record.run
        left, tokens = None, None
        with contextlib.suppress(RunError, OSError):
            if standing.state == "running":
                left = seconds_left(read_metrics(run / METRICS, last=20))
            tokens = RunFolder(run).result().get("training", {}).get("tokens")
        return Job(
            id=record.id,
            asked=record.asked,
            state=standing.state,
            created=record.created,
            run=record.run,
            seed=record.seed,
            finished=standing.finished,
            fine_tuned_model=record.model if standing.state == "succeeded" else None,
            trained_tokens=int(tokens) if tokens is not None else None,
            estimated_finish=int(time.time() + left) if left is not None else None,
            error=standing.error,
        )

    def _of_run(self, record: Record) -> Iterator[tuple[int, str, Level, str, dict[str, float | int] | None]]:
        """Yields the events recorded in the run's folder."""
        run = RunFolder(self._runs / record.run)
        try:
            lineage = run.lineage()
        except RunError:
            return
        if began := _seconds(lineage.get("created")):
            yield began, "started", "info", "Fine-tuning job started", None
        marks: dict[str, dict[str, Any]] = lineage.get("stages", {})
        for stage in STAGES:
            mark = marks.get(stage, {})
            ended = _seconds(mark.get("finished"))
            if stage == "train" and mark:
                start = _seconds(mark.get("began")) or (ended or record.created) - int(mark.get("seconds", 0))
                yield from _steps(read_metrics(run.path / METRICS), start, ended or int(time.time()))
            if ended:
                yield ended, f"stage-{stage}", "info", f"{stage}: done in {mark.get('seconds', 0):.0f} s", None
        if served := lineage.get("served"):
            at = _seconds(served["at"]) or record.created
            how = self._words(served["how"], record)
            if served["served"]:
                yield at, "served", "info", f"New fine-tuned model created: {record.model}, served {how}", None
            else:
                text = f"New fine-tuned model created: {record.model}. It is not served yet: {how}"
                yield at, "served", "warn", text, None

    # Changing a job ---------------------------------------------------------------------------------------------------

    def _submit(self, record: Record, conf: FinetuneConf) -> None:
        service = jobs.Service(record.model, self._home, record.arrived, record.urgent)
        self._runs.mkdir(parents=True, exist_ok=True)
        again = f"llm-ray finetune --config {self._runs / record.run / CONF}"
        jobs.submit(conf, by=record.by, command=again, service=service)
        self._write(replace(record, submitted=True))

    def _end(self, id: str, mark: str, text: str) -> Job:
        with self._changing():
            record = self._record(id)
            queued = self._queue().get(record.run)
            standing = self._standing(record, queued)
            if standing.state not in ("queued", "running"):
                raise Problem(400, f"The job `{id}` has ended: it is {standing.state}.")
            if RunFolder(self._runs / record.run).lineage().get("state") == "done":
                raise Problem(400, f"The job `{id}` has learned, and its model is about to be served.")
            if mark == "paused" and record.paused:
                raise Problem(400, f"The job `{id}` is paused already.")
            changed = replace(record, cancelled=int(time.time())) if mark == "cancelled" else record
            changed = replace(changed, paused=int(time.time())) if mark == "paused" else changed
            changed = _noted(changed, "info", text)
            self._write(changed)
            self._make_end(changed, queued)
        return self.get(id)

    def _make_end(self, record: Record, queued: jobs.Job | None) -> None:
        """Removes a job from the queue, or asks its process to stop. A process that is still starting cannot be asked;
        `recover` retries."""
        with contextlib.suppress(RunError):
            if queued and queued.state in ("waiting", "failed"):
                jobs.cancel(self._runs, record.run)
            elif queued:
                ask_to_stop(self._runs / record.run)

    def _base(self, model: str, named: Named | None, any_model: bool) -> tuple[str, str]:
        """Returns the conf's name of the base model, and its label in the new model's name. Raises Problem if the model
        cannot be finetuned."""
        if model.startswith(PREFIX) and (own := self._made(model)):
            return own.run, own.base
        registered = self._paths.models / model
        known = bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model)) and registered.is_dir()
        if named and named.adapter:
            raise Problem(
                400, f"model: `{model}` is an adapter: name the model that it is on", "invalid_model", param="model"
            )
        if named and not named.converted:
            return (model if known and registered == named.folder else str(named.folder)), model
        if known and (any_model or named):
            return model, model
        if named:
            raise Problem(
                400,
                f"model: `{model}` is served in a converted form, from which nothing can be trained: have the original "
                "imported under this name (llm-ray model import)",
                "invalid_model",
                param="model",
            )
        raise Problem(
            404,
            f"model: there is no `{model[:100]}` here to begin from: see /v1/models",
            "model_not_found",
            param="model",
        )

    def _made(self, model: str) -> Record | None:
        """Returns this owner's job that made `model`; None if there is none."""
        with contextlib.suppress(Problem):
            record = self._record(f"ftjob-{model.rpartition(':')[2]}")
            if record.model == model and not record.deleted and (self._runs / record.run / "output").is_dir():
                return record
        return None

    # Files ------------------------------------------------------------------------------------------------------------

    def _record(self, id: str) -> Record:
        record = self._read(self._place / id) if _ID.fullmatch(id) else None
        if record is None:
            raise Problem(404, f"There is no job `{id[:100]}`.", "not_found")
        return record

    def _records(self) -> list[Record]:
        found = [record for path in self._place.glob("ftjob-*") if (record := self._read(path))]
        return sorted(found, key=lambda record: record.arrived)

    def _read(self, folder: Path) -> Record | None:
        try:
            kept = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            notes = tuple((at, level, text) for at, level, text in kept["notes"])
            return Record(**kept | {"asked": Asked(**kept["asked"]), "notes": notes})
        except (OSError, ValueError, TypeError, KeyError):  # written by another version
            return None

    def _write(self, record: Record, folder: Path | None = None) -> None:
        text = json.dumps(asdict(record), ensure_ascii=False, indent=2)
        write_text((folder or self._place / record.id) / _RECORD, text, mode=0o600)

    def _conf(self, record: Record) -> FinetuneConf:
        return FinetuneConf.model_validate(stored_conf(self._place / record.id))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        if not self._place.is_dir():
            yield
            return
        with locked(self._place / ".lock"):
            yield

    @contextlib.contextmanager
    def _told(self, record: Record) -> Iterator[None]:
        try:
            yield
        except Problem:
            raise
        except jobs.Busy as error:
            raise Problem(503, _STILL_ENDING.format(record.id), "still_ending") from error
        except LlmRayError as error:
            raise Problem(400, self._words(str(error), record)) from error

    def _words(self, text: str, record: Record) -> str:
        """Returns a message without paths of this machine."""
        for id in filter(None, (record.asked.training_file, record.asked.validation_file)):
            with contextlib.suppress(Problem):
                text = text.replace(str(self._files.path(self._files.get(id))), id)
        return text.replace(str(self._home), "LLM_RAY_HOME")


def _noted(record: Record, level: Level, text: str) -> Record:
    return replace(record, notes=(*record.notes, (int(time.time()), level, text)))


def _seconds(when: str | None) -> int | None:
    """Returns an ISO 8601 time as seconds since 1970."""
    return int(datetime.fromisoformat(when).timestamp()) if when else None


def _losses(row: dict[str, Any]) -> dict[str, float]:
    names: dict[str, Callable[[], Any]] = {
        "train_loss": lambda: row.get("loss"),
        "valid_loss": lambda: row.get("validation_loss"),
    }
    return {name: float(value) for name, read in names.items() if (value := read()) is not None}


def _steps(
    rows: list[dict[str, Any]], began: int, ended: int
) -> Iterator[tuple[int, str, Level, str, dict[str, float | int] | None]]:
    """Yields an event per step with its losses. Its time is computed from the durations of the steps so far."""
    passed = 0.0
    for row in rows:
        passed += row.get("seconds") or 0.0
        figures = _losses(row)
        if not figures:
            continue
        total = row.get("total_steps")
        words = {"train_loss": "training loss", "valid_loss": "validation loss"}
        text = f"Step {row['step']}{f'/{total}' if total else ''}: " + ", ".join(
            f"{words[name]}={value:.4f}" for name, value in figures.items()
        )
        data: dict[str, float | int] = {"step": row["step"], **figures}
        if total:
            data["total_steps"] = total
        yield min(ended, int(began + passed)), f"step{row['step']}", "info", text, data
