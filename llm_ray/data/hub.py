"""Hub data sets: finds the files of a configuration and split, which are then read like local files.

``datasets`` determines the files (from the data set's card, or their names), and huggingface_hub downloads them. The
conversion by ``datasets`` is avoided: in mixed columns ``"42"`` becomes a number, and numbers lose digits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ray.errors import DataError

if TYPE_CHECKING:
    import datasets

HUB_URL = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})")
# Settings of a configuration that do not affect how its files are read, or that the readers detect (separators).
NEUTRAL = ("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter")


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set's configuration, as ``id[:configuration[:split]]`` names it in `source`."""

    source: str
    builder: datasets.DatasetBuilder
    split: str

    @property
    def splits(self) -> dict[str, list[str]]:
        """Paths or ``hf://`` addresses of the files of each split of the configuration; empty if not available."""
        return {str(split): list(files) for split, files in (self.builder.config.data_files or {}).items()}

    def conversion(self, suffixes: Collection[str]) -> str | None:
        """Returns why the files cannot be read by readers of `suffixes`; None if they can."""
        if not self.splits:
            return "only an earlier conversion is available"
        if unknown := {Path(file).suffix.lower() or file for file in self._files()} - set(suffixes):
            return f"it has files of an unsupported kind ({', '.join(sorted(unknown))})"
        usual, config = vars(type(self.builder.config)()), vars(self.builder.config)
        settings = [
            f"{key}={value!r}" for key, value in config.items() if key not in NEUTRAL and value != usual.get(key)
        ]
        return f"its card defines how to read it ({', '.join(settings)})" if settings else None

    def download(self) -> list[Path]:
        """Returns the split's files in order. Downloads all files of the configuration that are not cached, so that it
        is complete offline."""
        with _explained(self.source):
            paths = {file: _fetched(file) for files in self.splits.values() for file in files}
            return [paths[file] for file in self._files()]

    def converted(self) -> datasets.Dataset:
        """Returns the rows as converted by ``datasets``."""
        with _explained(self.source):
            self.builder.download_and_prepare()
            return self.builder.as_dataset(split=self.split)

    def _files(self) -> list[str]:
        return [file for split, files in self.splits.items() if self.split in (split, "all") for file in files]


def resolve(source: str) -> HubSplit:
    """Returns the split that `source` names. Raises :class:`DataError`, as its methods do, if it is not available."""
    name, configuration, split = (*source.split(":"), "", "")[:3]
    with _explained(source):
        found = HubSplit(source, _builder(name, configuration), split or "train")
    if found.splits and found.split not in (*found.splits, "all"):
        raise DataError(
            f"data set {source!r} has no split {found.split!r}; there are {', '.join(found.splits)}: name one as "
            "id:configuration:split"
        )
    return found


def _fetched(file: str) -> Path:
    from huggingface_hub import hf_hub_download

    if not (found := HUB_URL.fullmatch(file)):
        return Path(file)
    return Path(hf_hub_download(found["repo"], found["path"], repo_type="dataset", revision=found["revision"]))


def _builder(name: str, configuration: str) -> datasets.DatasetBuilder:
    """Returns the builder, with files by split in ``config.data_files``: from a folder or the hub, else from the local
    cache of the hub."""
    from datasets import load_dataset_builder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    builder, why = None, None
    if not constants.HF_HUB_OFFLINE or Path(name).is_dir():
        try:
            builder = load_dataset_builder(name, configuration or None)
        except (ConnectionError, LocalEntryNotFoundError) as error:
            why = error
        if builder and builder.config.data_files:
            return builder
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
        cached = load_dataset_builder(str(folder), configuration or None)
        _check_shards(name, cached.config.data_files or {})
        return cached
    except FileNotFoundError:  # not in the cache, or without data files
        if why and not builder:
            raise why from None
        return builder or load_dataset_builder(name, configuration or None)


def _check_shards(name: str, splits: dict[str, list[str]]) -> None:
    """Raises DataError if numbered files are missing: the cache itself does not record whether it is complete."""
    shards: dict[tuple[str, str], set[int]] = {}
    for file in (file for files in splits.values() for file in files):
        if found := SHARD.search(file):
            shards.setdefault((file[: found.start()], found["count"]), set()).add(int(found["number"]))
    for (prefix, count), numbers in shards.items():
        if missing := set(range(int(count))) - numbers:
            raise DataError(
                f"data set {name!r}: the hub cannot be reached, and its cache lacks {len(missing)} of {int(count)} "
                f"files, such as {Path(prefix).name}-{min(missing):05d}-of-{count}: download them once while "
                "connected"
            )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Converts exceptions of ``datasets`` and huggingface_hub to DataError."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise DataError(
            f"data set {source!r}: no file or folder of that name, and it cannot be downloaded from the hub "
            f"({_first_line(error)}). Without internet, copy the data set's files to this machine and name their "
            "folder"
        ) from error
    # An unknown configuration, an invalid card, or a loading script.
    except (ValueError, RuntimeError) as error:
        raise DataError(f"data set {source!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
