"""Data files: supported suffixes, the files of a folder, and the form of hub dataset ids."""

from __future__ import annotations

import re
from pathlib import Path

TABLES = (".parquet", ".arrow")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", *TABLES, ".txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
"""organisation/name, optionally with configuration and split after colons."""
# Metadata files that `datasets.save_to_disk` writes beside its Arrow files.
_BOOKKEEPING = ("dataset_info.json", "state.json", "dataset_dict.json")


def data_files(folder: Path) -> list[Path]:
    """Returns the data files of a folder, sorted by name, without hidden files and the metadata of `datasets`. Raises
    OSError."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in DATA_SUFFIXES
        and path.name not in _BOOKKEEPING
        and not path.name.startswith(".")
        and path.is_file()
    ]
