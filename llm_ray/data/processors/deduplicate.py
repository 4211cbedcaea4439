"""Rows that were there before, dropped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any


class Deduplicate:
    """Drops rows equal to an earlier one in `columns` (all columns, if none are named); upper case and spacing do not count.

    Remembers 16 bytes a row, not the row.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.columns = columns

    def __call__(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        seen: set[bytes] = set()
        for row in rows:
            key = {c: row[c] for c in self.columns} if self.columns else row
            text = " ".join(json.dumps(key, sort_keys=True, ensure_ascii=False, default=str).lower().split())
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield row
