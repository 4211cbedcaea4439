"""Finds and reads documents: text, Markdown, HTML and PDF.

for name, path in find(Path("handbook")).files.items(): document = read(path, name)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_ray.data.sources import open_text
from llm_ray.documents import html, markdown, pdf
from llm_ray.documents.document import Block, Document
from llm_ray.errors import DataError

MARKDOWN, HTML, PDF, TEXT = (".md", ".markdown"), (".html", ".htm", ".xhtml"), (".pdf",), (".txt", ".text")
SUFFIXES = (*TEXT, *MARKDOWN, *HTML, *PDF)


@dataclass(frozen=True, slots=True)
class Found:
    """The documents below a folder by relative path, and the number of other files by suffix."""

    files: dict[str, Path]
    others: Counter[str]


def find(folder: Path) -> Found:
    """Returns the documents in `folder` and its subfolders, sorted by path, without hidden ones; `folder` may also be a
    single document.

    Raises DataError if there are none.
    """
    kinds = ", ".join(SUFFIXES)
    if folder.is_file():
        if folder.suffix.lower() not in SUFFIXES:
            raise DataError(f"{folder}: not a document of a known kind ({kinds})")
        return Found({folder.name: folder}, Counter())
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    others: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or path.is_dir():
            continue
        if path.suffix.lower() in SUFFIXES:
            files[inside.as_posix()] = path
        else:
            others[path.suffix.lower() or path.name] += 1
    if not files:
        content = f"; it has {', '.join(f'{n} {suffix}' for suffix, n in others.most_common(5))}" if others else ""
        raise DataError(f"{folder}: contains no documents ({kinds}){content}")
    return Found(files, others)


def read(path: Path, name: str) -> Document:
    """Returns the document in `path`. Raises DataError, naming the file, if it cannot be read or contains no text."""
    suffix = path.suffix.lower()
    try:
        if suffix in PDF:
            document = pdf.read(path, name)
        elif suffix in HTML:
            document = html.read(path.read_bytes(), name)
        else:
            text = _text(path)
            document = markdown.read(text, name) if suffix in MARKDOWN else _plain(text, name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not any(block.text.strip() for block in document.blocks):
        raise DataError(f"{path}: contains no text")
    return document


def _text(path: Path) -> str:
    try:
        with open_text(path) as file:
            text = file.read()
        text.encode()  # raises for invalid UTF-8, which was read as lone surrogates
    except UnicodeError:
        raise DataError(f"{path}: not UTF-8: save the file as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path}: not a text file (it has bytes of value zero)")
    return text.replace("\r\n", "\n")


def _plain(text: str, name: str) -> Document:
    return Document(name, Path(name).stem, tuple(_paragraphs(text)))


def _paragraphs(text: str) -> Iterator[Block]:
    """Yields the paragraphs, which are separated by empty lines."""
    began, lines = 1, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            began = began if lines else number
            lines.append(line.rstrip())
        elif lines:
            yield Block("\n".join(lines), began, number - 1)
            lines = []
