"""Uploaded files: separate per user, and in Gradio's cache only until a screen takes them.

Gradio names cached files by content hash, so users who send the same file would share it, and anyone who knows a path
could read it. Here each upload has its own folder below its sender's, which other users cannot access.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive

from llm_ray.errors import DataError
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role

_LEFT_AFTER = 3600.0
"""Seconds after which a file that no screen took is deleted."""
_BESIDE_FILES = 2**20
"""Allowance in bytes for the parts of a request that are not the file: names, separators."""


class _TooLargeError(Exception):
    pass


class Uploads:
    """The upload folders: `cache`, which Gradio uses, and `taken`, with a folder per user."""

    def __init__(self, home: Path, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.cache = home / "ui" / "cache" / f"{socket.gethostname()}-{os.getpid()}"
        self._received = self.cache / "received"
        self._taken = home / "uploads"
        _discard_dead(self.cache.parent)
        for folder in (self._received, self._taken):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.cache.parent, self.cache, self._received, self._taken):
            folder.chmod(0o700)

    async def receive(self, request: Request) -> Response:
        """Handles Gradio's upload POST; returns the files' paths in the sender's cache folder. Only users and admins
        may upload."""
        visitor: Visitor = request.state.visitor
        if not visitor.role.covers(Role.USER):
            return JSONResponse({"detail": "Viewers cannot upload files."}, status_code=403)
        too_large = PlainTextResponse(
            f"The file is larger than {self.most_bytes / 2**20:,.0f} MiB, the limit of this page (llm-ray ui "
            "--max-upload-mib).",
            status_code=413,
            headers={"connection": "close"},
        )
        most = self.most_bytes + _BESIDE_FILES
        declared = Headers(scope=request.scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            return too_large
        from gradio.route_utils import upload_fn
        from gradio.routes import file_upload_statuses

        folder = self._folder(visitor.name) / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        progress = request.query_params.get("upload_id")
        counted = Request(request.scope, _counting(request.receive, most))
        try:
            paths, _, _ = await upload_fn(
                counted, folder, self.most_bytes, progress, upload_progress=file_upload_statuses if progress else None
            )
        except (_TooLargeError, MultiPartException) as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, _TooLargeError) or "maximum allowed size" in error.message:
                return too_large
            return PlainTextResponse(f"The upload cannot be read: {error.message}", status_code=400)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for part in folder.iterdir():
            if part.is_file():  # incomplete file; complete ones have their own folders
                part.unlink()
        return JSONResponse([str(path) for path in paths])

    def may_read(self, name: str, path: str) -> bool:
        """Returns whether a user may name this path in a request: own uploads, and Gradio's cached outputs, whose names
        cannot be guessed."""
        if "\0" in path or not path.startswith("/"):
            return False
        found = Path(os.path.realpath(path))
        if found.is_relative_to(os.path.realpath(self._received)):
            return found.is_relative_to(os.path.realpath(self._received / name))
        return found.is_relative_to(os.path.realpath(self.cache))

    def take(self, visitor: Visitor, path: str, name: str | None = None) -> Path:
        """Moves an uploaded file from the cache into the visitor's own folder and returns its path. It stays there
        until `drop`.

        `name` is the file's new name (default: as uploaded); if it is taken, a number is appended. Raises DataError if
        the visitor did not upload this file.
        """
        source = Path(os.path.realpath(path))
        if not source.is_relative_to(os.path.realpath(self._folder(visitor.name))) or not source.is_file():
            raise DataError(f"{name or Path(path).name} no longer exists: upload it again")
        folder = self.folder(visitor)
        wanted = Path(harmless_name(name or source.name))
        for number in range(1, 10_000):
            target = folder / (wanted.name if number == 1 else f"{wanted.stem}-{number}{wanted.suffix}")
            try:
                os.link(source, target)  # fails if the name is taken
            except FileExistsError:
                continue
            target.chmod(0o600)
            shutil.rmtree(source.parent, ignore_errors=True)
            with contextlib.suppress(OSError):
                source.parent.parent.rmdir()
            return target
        raise DataError(f"{folder} holds too many files called {wanted.name}: delete some")

    def drop(self, visitor: Visitor, path: Path) -> None:
        """Deletes a taken file. Raises DataError if it is not the visitor's."""
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder(visitor))):
            raise DataError(f"{Path(path).name} is not one of your files")
        Path(path).unlink(missing_ok=True)

    def folder(self, visitor: Visitor) -> Path:
        """Returns the visitor's own folder, created if missing; only the server's system user can read it."""
        folder = self._taken / visitor.name
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def sweep(self) -> None:
        """Deletes uploads that were not taken within an hour."""
        for upload in self._received.glob("*/*"):
            with contextlib.suppress(OSError):
                if time.time() - upload.stat().st_mtime > _LEFT_AFTER:
                    shutil.rmtree(upload, ignore_errors=True)

    def close(self) -> None:
        """Deletes the cache when the server ends."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def _folder(self, name: str) -> Path:
        folder = self._received / name
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder


def harmless_name(name: str) -> str:
    """Returns a file name without folders, control characters, a leading dot or characters special to shells and
    browsers."""
    plain = re.sub(r"[^\w.-]+", "_", name.replace("\\", "/").rpartition("/")[2]).strip("._-")
    stem, dot, suffix = plain.rpartition(".")
    return f"{stem[:100]}.{suffix[:20]}" if dot and stem else plain[:100] or "file"


def _counting(receive: Receive, most: int) -> Callable[[], Awaitable[Message]]:
    """Returns a `receive` that aborts a body larger than `most`, whatever length its header declares."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise _TooLargeError
        return message

    return counted


def _discard_dead(folder: Path) -> None:
    """Deletes cache folders of killed servers on this host."""
    for cache in folder.glob(f"{socket.gethostname()}-*"):
        pid = cache.name.rpartition("-")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(cache, ignore_errors=True)
