"""Data files: supported suffixes, the files of a folder, the form of hub dataset ids, and local tasks."""

from __future__ import annotations

import re
from pathlib import Path

TABLES = (".parquet", ".arrow")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", *TABLES, ".txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
"""organisation/name, optionally with configuration and split after colons."""
TASK_SUFFIXES = (".yaml", ".yml")
# Metadata files that `datasets.save_to_disk` writes beside its Arrow files.
_BOOKKEEPING = ("dataset_info.json", "state.json", "dataset_dict.json")


def is_task_path(name: str) -> bool:
    """Returns whether an entry of evaluation.tasks is a local file or folder, and not the name of one of the evaluation
    harness's tasks."""
    return "/" in name or name.startswith(("~", ".")) or name.endswith(TASK_SUFFIXES)


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
