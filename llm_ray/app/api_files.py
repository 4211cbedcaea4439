"""Files uploaded through the fine-tuning API: separate per owner, validated, within a quota.

files = Files(home / "finetuning" / owner / "files", settings)
upload = files.begin()                      # the caller writes the bytes to upload.path
file = files.keep(upload, "rows.jsonl", None)

Each file has its own folder, `file-…`, with `file.json` and the rows. Only this system user can read them (folders
0700, files 0600). The client's file name is stored as a label and never becomes part of a path.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from llm_ray.apart import Apart
from llm_ray.conf.finetune import Data
from llm_ray.conf.objectives import PAIR_FORMATS, Reads
from llm_ray.conf.serve import FinetuningApi
from llm_ray.data.formats import REQUIRED, Formatter
from llm_ray.data.sources import read
from llm_ray.datafiles import DATA_SUFFIXES
from llm_ray.errors import DataError, LlmRayError
from llm_ray.files import locked, write_text
from llm_ray.progress import Reporter
from llm_ray.serve.gateway.finetuning.service import Problem, StoredFile, Upload

_ID = re.compile(r"file-[0-9a-f]{24}")
_META, _ROWS = "file.json", "rows"
_ARRIVING = ".arriving-"
_LEFT_AFTER = 86_400.0  # seconds after which remains of a killed upload are deleted
_MOST_MEMORY = 4 * 2**30  # memory limit of a check, in bytes
_FORMATS: tuple[str, ...] = get_args(Data.model_fields["format"].annotation)
_checking = threading.BoundedSemaphore(1)  # checks are CPU-bound, so only one runs at a time


class Files:
    """The files of one owner, stored in the folder `place`."""

    def __init__(self, place: Path, settings: FinetuningApi) -> None:
        self._place, self._settings = place, settings
        self._checks: dict[str, Apart] = {}

    def begin(self) -> Upload:
        """Reserves a folder for an upload. Raises Problem if the quota is used up."""
        for folder in (self._place.parent.parent, self._place.parent, self._place):
            folder.mkdir(exist_ok=True, mode=0o700, parents=True)
        self._sweep()
        largest = int(self._settings.max_file_mib * 2**20)
        left = int(self._settings.max_stored_mib * 2**20) - self._stored()
        if left <= 0:
            raise Problem(413, self._full(), "quota_exceeded", param="file")
        over = f"file: it is larger than {self._settings.max_file_mib:g} MiB" if largest <= left else self._full()
        id = f"file-{secrets.token_hex(12)}"
        folder = self._place / f"{_ARRIVING}{id}"
        folder.mkdir(mode=0o700)
        return Upload(id, folder / _ROWS, min(largest, left), over)

    def keep(self, upload: Upload, label: str, form: str | None) -> StoredFile:
        """Validates an uploaded file and stores it. Raises Problem, which names the line of the first invalid row."""
        suffix = suffix_of(label)
        if form is not None and form not in _FORMATS:
            raise Problem(400, f"format: it is one of {', '.join(_FORMATS)}", param="format")
        folder = upload.path.parent
        rows = upload.path.with_name(f"{_ROWS}{suffix}")
        upload.path.rename(rows)
        size = rows.stat().st_size
        if not size:
            raise Problem(400, "file: it is empty", param="file")
        checked = self._check(upload, rows, label, form)
        made = StoredFile(upload.id, label, size, int(time.time()), checked.rows, checked.format, suffix)
        with locked(self._place / ".lock"):
            if self._stored() + size > self._settings.max_stored_mib * 2**20:
                raise Problem(413, self._full(), "quota_exceeded", param="file")  # a concurrent upload took the space
            write_text(folder / _META, json.dumps(asdict(made)), mode=0o600)
            folder.rename(self._place / upload.id)
        return made

    def abandon(self, upload: Upload) -> None:
        """Discards an upload that was not kept, and kills its check."""
        if check := self._checks.get(upload.id):
            check.kill()
        shutil.rmtree(upload.path.parent, ignore_errors=True)

    def all(self) -> list[StoredFile]:
        """Returns all files, oldest first."""
        found = [file for path in self._place.glob("file-*") if (file := self._read(path))]
        return sorted(found, key=lambda file: (file.created, file.id))

    def get(self, id: str, param: str | None = None) -> StoredFile:
        """Returns the file `id`. Raises Problem if it does not exist; `param` is the request field that names it."""
        file = self._read(self._place / id) if _ID.fullmatch(id) else None
        if file is None:
            raise Problem(404, f"There is no file `{id[:100]}`.", "not_found", param=param)
        return file

    def path(self, file: StoredFile) -> Path:
        """Returns the path of the file's rows."""
        return self._place / file.id / f"{_ROWS}{file.suffix}"

    def delete(self, id: str) -> None:
        """Deletes the file `id`. Raises Problem if it does not exist."""
        folder = self._place / self.get(id).id
        gone = self._place / f"{_ARRIVING}{id}-{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):  # deleted by another request
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _read(self, folder: Path) -> StoredFile | None:
        try:
            return StoredFile(**json.loads((folder / _META).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # deleted meanwhile, or written by another version
            return None

    def _stored(self) -> int:
        return sum(file.bytes for file in self.all())

    def _full(self) -> str:
        return (
            f"file: your files would take more than {self._settings.max_stored_mib:g} MiB: delete some first "
            "(DELETE /v1/files/{file_id})"
        )

    def _sweep(self) -> None:
        for folder in self._place.glob(f"{_ARRIVING}*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _LEFT_AFTER:
                    shutil.rmtree(folder, ignore_errors=True)

    def _check(self, upload: Upload, rows: Path, label: str, form: str | None) -> Checked:
        with _checking:
            process = self._checks[upload.id] = Apart()
            try:
                if not rows.exists():
                    raise Problem(400, "file: the upload broke off", param="file")
                for kind, value in process.events(check, str(rows), form or "auto"):
                    if kind == "returned":
                        checked: Checked = value
                        return checked
                raise AssertionError
            except Problem:
                raise
            except LlmRayError as error:
                message = str(error).replace(str(rows), (label or "file")[:100])
                raise Problem(400, f"file: {message}", "invalid_file", param="file") from error
            except Exception as error:  # the check was killed by `abandon` or ran out of memory
                raise Problem(400, "file: it could not be checked: a row is too large", "invalid_file") from error
            finally:
                del self._checks[upload.id]
                process.kill()


def suffix_of(label: str) -> str:
    """Returns the suffix of the client's file name, `.jsonl` if it has none. Raises Problem for an unsupported
    suffix."""
    suffix = Path(label.replace("\\", "/").rpartition("/")[2].replace("\0", "")).suffix.lower()
    if suffix in DATA_SUFFIXES:
        return suffix
    if suffix:
        raise Problem(
            400, f"file: its name ends in {suffix[:20]}; the kinds known are {', '.join(DATA_SUFFIXES)}", param="file"
        )
    return ".jsonl"


@dataclass(frozen=True)
class Checked:
    """The result of a check: all rows are valid."""

    rows: int
    format: str


def check(file: str, form: str, *, reporter: Reporter | None = None) -> Checked:
    """Reads a file as a finetune does. Limits the memory of its whole process, so it must run in a separate process,
    which also protects the gateway. Raises DataError for the first invalid row, and ConfError."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
    try:
        return check_rows(file, form)
    except MemoryError:
        raise DataError(f"{file}: a row of it is too large") from None


def check_rows(file: str, form: str) -> Checked:
    """Like `check`, without the memory limit."""
    first = next(read(file, _raise), None)
    if first is None:
        raise DataError(f"{file}: it holds no rows")
    formatter = Formatter(Data.model_validate({"train": [file], "format": form}), reads_of(form, first.values))
    rows = 0
    for row in read(file, _raise):
        formatter(row)
        rows += 1
    return Checked(rows, formatter.formats[0] if formatter.formats else form)


def reads_of(form: str, row: Mapping[str, Any] = MappingProxyType({})) -> Reads:
    """Returns what an objective reads from rows of format `form`: texts, pairs or conversations. `auto` is detected
    from the columns of `row`."""
    if form == "auto":
        known = [name for name, columns in REQUIRED.items() if all(column in row for column in columns)]
        form = next((name for name in known if name in PAIR_FORMATS), known[0] if known else form)
    return "texts" if form == "text" else "pairs" if form in PAIR_FORMATS else "conversations"


def _raise(error: DataError) -> None:
    raise error
