"""Drops repeated rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any


class Deduplicate:
    """Drops rows equal to an earlier one in `columns` (default: all columns), ignoring case and spacing.

    Keeps a hash of 16 bytes per row in memory.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.columns = columns

    def __call__(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        seen: set[bytes] = set()
        for row in rows:
            key = [(c, row[c]) for c in (self.columns or sorted(row))]
            plain = [(c, " ".join(v.lower().split()) if isinstance(v, str) else v) for c, v in key]
            digest = hashlib.blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield row
