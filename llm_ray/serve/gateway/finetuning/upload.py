"""Receives a file as multipart/form-data and streams it to disk, without holding it in memory.

Form: RFC 7578. Its parts are `purpose` and `file`, as OpenAI's clients send them, and optionally `format`, the format
of the file's rows.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from llm_ray.serve.gateway.finetuning.service import Problem, Upload

_AT_ONCE = 1 << 20  # bytes written to disk at a time
_FIELD_BYTES = 4096
_FIELDS = 16
_LABEL = 255  # maximum characters kept of a file's name


class Form:
    """Incremental parser of a form: fields are kept in memory, the file is written to disk."""

    def __init__(self, boundary: bytes, upload: Upload) -> None:
        self.fields: dict[str, str] = {}
        self.label = ""
        self.files = 0
        self._upload = upload
        self._written = 0
        self._file: IO[bytes] | None = None
        self._name = self._header = self._value = b""
        self._content: bytearray | None = None
        self._disposition = b""
        self._whole = False
        self._busy = threading.Lock()  # a disconnecting client closes the form while a piece is written
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
                "on_end": self._ends,
            },
        )

    def write(self, data: bytes) -> None:
        """Parses a piece of the body. Raises Problem for an invalid form or a file that is too large."""
        with self._busy:
            try:
                self._parser.write(data)
            except FormParserError as error:
                raise Problem(400, f"The body is no multipart/form-data: {error}") from error

    def close(self) -> None:
        """Closes the file if the form ended within it."""
        with self._busy:
            self._close()

    def _close(self) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def check(self) -> None:
        """Raises Problem if the form is incomplete or has no file."""
        if not self._whole:
            raise Problem(400, "The body ends before its last part does: send it again.")
        if not self.files:
            raise Problem(400, "file: it is missing: a part of the form with a filename", param="file")

    def _part_begins(self) -> None:
        self._disposition, self._content, self._name = b"", None, b""
        self._header = self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options:
            if name != "file" or self.files:
                raise Problem(400, f"{name[:50] or 'file'}: a form has one file, in its part `file`", param="file")
            self.files = 1
            self.label = options[b"filename"].decode(errors="replace")[:_LABEL]
            self._file = os.fdopen(os.open(self._upload.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            return
        if len(self.fields) >= _FIELDS or not name:
            raise Problem(400, f"The form has more than {_FIELDS} fields, or one without a name.")
        self._name, self._content = name.encode(), bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._content is not None:
            self._content += data[start:end]
            if len(self._content) > _FIELD_BYTES:
                raise Problem(400, f"{self._name.decode()[:50]}: it has more than {_FIELD_BYTES} bytes")
        elif self._file:
            self._written += end - start
            if self._written > self._upload.most:
                raise Problem(413, self._upload.over, "file_too_large", param="file")
            self._file.write(data[start:end])

    def _part_ends(self) -> None:
        if self._content is not None:
            self.fields[self._name.decode()] = self._content.decode(errors="replace")
            self._content = None
        else:
            self._close()

    def _ends(self) -> None:
        self._whole = True


async def receive(request: Request, upload: Upload) -> Form:
    """Returns the form of a request; its file is stored at `upload.path`. Raises Problem, and ClientDisconnect if the
    client disconnects."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Problem(415, "The body has to be multipart/form-data, with a boundary.", "unsupported_media_type")
    try:
        form = Form(options[b"boundary"], upload)
    except FormParserError as error:
        raise Problem(400, f"The body is no multipart/form-data: {error}") from error
    piece = bytearray()
    try:
        async for chunk in request.stream():
            piece += chunk
            if len(piece) >= _AT_ONCE:
                await asyncio.to_thread(form.write, bytes(piece))
                piece.clear()
        await asyncio.to_thread(form.write, bytes(piece))
        form.check()
    finally:
        await asyncio.to_thread(form.close)
    return form
