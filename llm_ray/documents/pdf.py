"""Reads PDF as blocks with pypdf: the text of each page, in the file's order."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

from llm_ray.documents.document import Block, Document
from llm_ray.errors import DataError

HYPHEN = re.compile(r"(?<=[^\W\d_])-\n(?=[a-zà-ÿ])")
"""A word hyphenated at the end of a line."""
SURROGATES = re.compile("[\ud800-\udfff\0]")
ON_MANY_PAGES = 4
"""Minimum number of pages for detecting headers and footers."""


def read(path: Path, name: str) -> Document:
    """Returns the document in `path`. Raises DataError if it is encrypted, broken or without text; OSError."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns about oddities that it can handle
    with path.open("rb") as file:
        try:
            reader = pypdf.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                raise DataError(f"{path}: encrypted: save it without a password")
            pages = [SURROGATES.sub("", page.extract_text()) for page in reader.pages]
            title = reader.metadata.title if reader.metadata else None
        except (DataError, OSError):
            raise
        except Exception as error:  # broken files raise all kinds of errors in pypdf
            reason = str(error) or type(error).__name__
            raise DataError(f"{path}: not a complete PDF, or one that cannot be read: {reason}") from error
    empty = sum(not page.strip() for page in pages)
    if empty == len(pages):
        raise DataError(
            f"{path}: none of its {len(pages)} pages has text: if they were scanned, add the text first, by OCR (ocrmypdf)"
        )
    note = f"{empty} of {len(pages)} pages have no text (scanned?)" if empty else ""
    blocks = tuple(
        Block(HYPHEN.sub("", paragraph), number, number)
        for number, page in enumerate(_without_edges(pages), 1)
        for paragraph in re.split(r"\n[ \t]*\n", page)
        if paragraph.strip()
    )
    return Document(name, (title or "").strip() or Path(name).stem, blocks, paged=True, note=note)


def _without_edges(pages: list[str]) -> list[str]:
    """Returns the pages without headers and footers: first and last lines shared by most pages, ignoring numbers."""
    lines = [[line.rstrip() for line in page.strip().split("\n")] for page in pages]
    if len(pages) < ON_MANY_PAGES:
        return ["\n".join(page) for page in lines]
    counts = Counter(edge for page in lines for edge in {(at, _plain(page[at])) for at in (0, -1)})
    common = {edge for edge, count in counts.items() if count > len(pages) / 2}
    kept = []
    for page in lines:
        first = (0, _plain(page[0])) in common
        last = (-1, _plain(page[-1])) in common
        kept.append("\n".join(page[first : len(page) - last]))
    return kept


def _plain(line: str) -> str:
    return re.sub(r"\d+", "0", " ".join(line.split()))
