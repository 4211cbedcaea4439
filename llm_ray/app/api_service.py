"""The use cases of the fine-tuning API, as the gateway asks for them: files and jobs, each owner's apart from the
others'.

service = open_service(home, FinetuningApi(enabled=True))
job = service.create(service.owner_of("alice"), "alice", asked, named, any_model=True)

All of it lies under `LLM_RAY_HOME/finetuning`, open to this user alone, in a folder for each owner, which is called by
a hash: names of keys are people's own, and no parts of paths.
"""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
from pathlib import Path

from llm_ray.app.api_files import Files
from llm_ray.app.api_jobs import Jobs
from llm_ray.conf.serve import FinetuningApi
from llm_ray.serve.gateway.finetuning.service import (
    Asked,
    Checkpoint,
    Event,
    Job,
    Named,
    Problem,
    StoredFile,
    Upload,
)

_LOG = logging.getLogger("ray.serve")
_LOCAL = "local"
_MADE = re.compile(r"[0-9a-f]{12}")


def open_service(home: Path, settings: FinetuningApi) -> ApiService:
    """The use cases with the files and jobs of `home`, within the limits of `settings`."""
    return ApiService(home, settings)


class ApiService:
    """Files and jobs of all owners. May be asked by several threads at a time."""

    def __init__(self, home: Path, settings: FinetuningApi) -> None:
        self._home, self._settings, self._root = home, settings, home / "finetuning"
        self._files: dict[str, Files] = {}
        self._owners: dict[str, str] = {}

    def owner_of(self, key: str | None) -> str:
        """The owner for the name of an API key; without keys there is one."""
        return _LOCAL if key is None else hashlib.sha256(key.encode()).hexdigest()[:32]

    def begin(self, owner: str) -> Upload:
        """Make room for a file that is being sent. Raises Problem."""
        return self._of(owner).begin()

    def keep(self, owner: str, upload: Upload, label: str, form: str | None) -> StoredFile:
        """Check the file that was sent, and keep it. Raises Problem."""
        return self._of(owner).keep(upload, label, form)

    def abandon(self, owner: str, upload: Upload) -> None:
        """Forget a file that was not kept."""
        self._of(owner).abandon(upload)

    def files(self, owner: str) -> list[StoredFile]:
        """The oldest first."""
        return self._of(owner).all()

    def file(self, owner: str, id: str) -> StoredFile:
        """Raises Problem."""
        return self._of(owner).get(id)

    def content(self, owner: str, id: str) -> Path:
        """Where a file's rows are. Raises Problem."""
        return self._of(owner).path(self._of(owner).get(id))

    def delete_file(self, owner: str, id: str) -> None:
        """Raises Problem, also while a job needs the file."""
        self._of(owner).get(id)
        if job := self._jobs(owner).uses(id):
            raise Problem(
                400, f"The job {job} learns from the file `{id}`: wait for its end, or cancel it.", "file_in_use"
            )
        self._of(owner).delete(id)

    def create(
        self, owner: str, key: str | None, asked: Asked, named: Named | None, *, any_model: bool, urgent: bool = False
    ) -> Job:
        """Put a job into the queue, `urgent` before those that are not. Raises Problem."""
        return self._jobs(owner).create(asked, f"{key or _LOCAL} (API)", named, any_model=any_model, urgent=urgent)

    def jobs(self, owner: str) -> list[Job]:
        """The oldest first."""
        return self._jobs(owner).all()

    def job(self, owner: str, id: str) -> Job:
        """Raises Problem."""
        return self._jobs(owner).get(id)

    def cancel(self, owner: str, id: str) -> Job:
        """End a job for good. Raises Problem."""
        return self._jobs(owner).cancel(id)

    def pause(self, owner: str, id: str) -> Job:
        """Have a job wait. Raises Problem."""
        return self._jobs(owner).pause(id)

    def resume(self, owner: str, id: str) -> Job:
        """Have a job go on. Raises Problem."""
        return self._jobs(owner).resume(id)

    def events(self, owner: str, id: str) -> list[Event]:
        """The oldest first. Raises Problem."""
        return self._jobs(owner).events(id)

    def checkpoints(self, owner: str, id: str) -> list[Checkpoint]:
        """The oldest first. Raises Problem."""
        return self._jobs(owner).checkpoints(id)

    def delete_model(self, owner: str, model: str, *, served: bool, any_owner: bool) -> str:
        """Take a model away that a job has made, and from the endpoint if it is `served`; returns what is kept. Raises
        Problem."""
        if any_owner:
            owner = self._maker(model) or owner
        return self._jobs(owner).delete_model(model, self._stop if served else None)

    def _stop(self, model: str) -> None:
        """Have the endpoint serve a model no more, by a process that has nothing of this one's Ray. Raises Problem."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llm_ray.cli.unserve", str(self._home), model],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, _ = process.communicate()
        if process.returncode:
            _LOG.warning(f"{model} could not be taken away: {said}")
            raise Problem(
                503, f"The model `{model}` could not be taken away now: ask again in a moment.", "still_served"
            )

    def may_ask(self, owner: str, model: str) -> bool | None:
        """Whether the job that has made a model is this owner's; None where no job has."""
        maker = self._maker(model)
        return None if maker is None else maker == owner

    def _maker(self, model: str) -> str | None:
        """The owner of the job that has made a model, by the id at the end of its name; None where no job has."""
        id = model.rpartition(":")[2]
        if not _MADE.fullmatch(id):
            return None
        if id not in self._owners:
            found = next(self._root.glob(f"*/jobs/ftjob-{id}"), None)
            if found is None:
                return None
            self._owners[id] = found.parent.parent.name
        return self._owners[id]

    def recover(self) -> None:
        """Have jobs go on whose processes were killed."""
        for place in self._root.glob("*/jobs"):
            self._jobs(place.parent.name).recover()

    def _of(self, owner: str) -> Files:
        return self._files.setdefault(owner, Files(self._root / owner / "files", self._settings))

    def _jobs(self, owner: str) -> Jobs:
        return Jobs(self._root / owner / "jobs", self._home, self._of(owner), self._settings)
