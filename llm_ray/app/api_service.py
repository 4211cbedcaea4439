"""Files and jobs of the fine-tuning API, as the gateway calls them, separate per owner.

service = open_service(home, FinetuningApi(enabled=True))
job = service.create(service.owner_of("alice"), "alice", asked, named, any_model=True)

Everything is stored in `LLM_RAY_HOME/finetuning`, readable by this system user only. Each owner has a folder named by a
hash, since key names are chosen by users and unsafe as path components.
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
    """Returns the service for the files and jobs of `home`, within the limits of `settings`."""
    return ApiService(home, settings)


class ApiService:
    """Files and jobs of all owners. Thread-safe."""

    def __init__(self, home: Path, settings: FinetuningApi) -> None:
        self._home, self._settings, self._root = home, settings, home / "finetuning"
        self._files: dict[str, Files] = {}
        self._owners: dict[str, str] = {}

    def owner_of(self, key: str | None) -> str:
        """Returns the owner id of an API key's name; without keys there is a single owner."""
        return _LOCAL if key is None else hashlib.sha256(key.encode()).hexdigest()[:32]

    def begin(self, owner: str) -> Upload:
        """Reserves a folder for an upload. Raises Problem."""
        return self._of(owner).begin()

    def keep(self, owner: str, upload: Upload, label: str, form: str | None) -> StoredFile:
        """Validates an uploaded file and stores it. Raises Problem."""
        return self._of(owner).keep(upload, label, form)

    def abandon(self, owner: str, upload: Upload) -> None:
        """Discards an upload that was not kept."""
        self._of(owner).abandon(upload)

    def files(self, owner: str) -> list[StoredFile]:
        """Returns the owner's files, oldest first."""
        return self._of(owner).all()

    def file(self, owner: str, id: str) -> StoredFile:
        """Returns a file. Raises Problem if it does not exist."""
        return self._of(owner).get(id)

    def content(self, owner: str, id: str) -> Path:
        """Returns the path of a file's rows. Raises Problem if the file does not exist."""
        return self._of(owner).path(self._of(owner).get(id))

    def delete_file(self, owner: str, id: str) -> None:
        """Deletes a file. Raises Problem if it does not exist or a job still needs it."""
        self._of(owner).get(id)
        if job := self._jobs(owner).uses(id):
            raise Problem(
                400, f"The job {job} learns from the file `{id}`: wait for its end, or cancel it.", "file_in_use"
            )
        self._of(owner).delete(id)

    def create(
        self, owner: str, key: str | None, asked: Asked, named: Named | None, *, any_model: bool, urgent: bool = False
    ) -> Job:
        """Queues a job, ahead of others if `urgent`. Raises Problem."""
        return self._jobs(owner).create(asked, f"{key or _LOCAL} (API)", named, any_model=any_model, urgent=urgent)

    def jobs(self, owner: str) -> list[Job]:
        """Returns the owner's jobs, oldest first."""
        return self._jobs(owner).all()

    def job(self, owner: str, id: str) -> Job:
        """Returns a job. Raises Problem if it does not exist."""
        return self._jobs(owner).get(id)

    def cancel(self, owner: str, id: str) -> Job:
        """Ends a job for good. Raises Problem."""
        return self._jobs(owner).cancel(id)

    def pause(self, owner: str, id: str) -> Job:
        """Pauses a job. Raises Problem."""
        return self._jobs(owner).pause(id)

    def resume(self, owner: str, id: str) -> Job:
        """Resumes a job. Raises Problem."""
        return self._jobs(owner).resume(id)

    def events(self, owner: str, id: str) -> list[Event]:
        """Returns a job's events, oldest first. Raises Problem."""
        return self._jobs(owner).events(id)

    def checkpoints(self, owner: str, id: str) -> list[Checkpoint]:
        """Returns a job's checkpoints, oldest first. Raises Problem."""
        return self._jobs(owner).checkpoints(id)

    def delete_model(self, owner: str, model: str, *, served: bool, any_owner: bool) -> str:
        """Deletes a job's model, and undeploys it if it is `served`; returns a message about what remains. Raises
        Problem."""
        if any_owner:
            owner = self._maker(model) or owner
        return self._jobs(owner).delete_model(model, self._stop if served else None)

    def _stop(self, model: str) -> None:
        """Undeploys a model in a new process, which does not share this process's Ray. Raises Problem if that fails."""
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
        """Returns whether this owner's job made the model; None if no job did."""
        maker = self._maker(model)
        return None if maker is None else maker == owner

    def _maker(self, model: str) -> str | None:
        """Returns the owner of the job that made the model, found by the id at the end of its name; None if no job
        did."""
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
        """Restarts jobs whose processes were killed."""
        for place in self._root.glob("*/jobs"):
            self._jobs(place.parent.name).recover()

    def _of(self, owner: str) -> Files:
        return self._files.setdefault(owner, Files(self._root / owner / "files", self._settings))

    def _jobs(self, owner: str) -> Jobs:
        return Jobs(self._root / owner / "jobs", self._home, self._of(owner), self._settings)
