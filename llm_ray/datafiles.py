"""Data files: supported types, the files of a folder, and names of hub data sets."""

from __future__ import annotations

import re
from pathlib import Path

TABLES = (".parquet", ".arrow")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", *TABLES, ".txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
"""organisation/name, with a configuration and a split after colons."""
# What `datasets.save_to_disk` writes beside its Arrow files.
_BOOKKEEPING = ("dataset_info.json", "state.json", "dataset_dict.json")


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that are read, sorted by name: not those that are hidden, and not what `datasets` keeps
    beside its tables. Raises OSError."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in DATA_SUFFIXES
        and path.name not in _BOOKKEEPING
        and not path.name.startswith(".")
        and path.is_file()
    ]
