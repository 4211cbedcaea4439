"""Hub data sets: finds the files of a configuration and split, which are then read like local files.

``datasets`` says which files they are (from the data set's card, or their names), and huggingface_hub brings them. What
it would convert them to is not used: of mixed contents ``"42"`` becomes a number there, and numbers lose their digits.
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
# Settings of a configuration that say nothing of how its files are read, or what the readers find out (separators).
NEUTRAL = ("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter")


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set's configuration, as ``id[:configuration[:split]]`` names it in `source`."""

    source: str
    builder: datasets.DatasetBuilder
    split: str

    @property
    def splits(self) -> dict[str, list[str]]:
        """Of each split of the configuration, the paths or ``hf://`` addresses of its files; empty if they are not to
        be had."""
        return {str(split): list(files) for split, files in (self.builder.config.data_files or {}).items()}

    def conversion(self, suffixes: Collection[str]) -> str | None:
        """Why the files cannot be read by readers of `suffixes`; None where they can."""
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
        """The split's files in order. All of the configuration are downloaded, unless the cache has them, so that it is
        whole offline."""
        with _explained(self.source):
            paths = {file: _fetched(file) for files in self.splits.values() for file in files}
            return [paths[file] for file in self._files()]

    def converted(self) -> datasets.Dataset:
        """The rows as ``datasets`` converts them."""
        with _explained(self.source):
            self.builder.download_and_prepare()
            return self.builder.as_dataset(split=self.split)

    def _files(self) -> list[str]:
        return [file for split, files in self.splits.items() if self.split in (split, "all") for file in files]


def resolve(source: str) -> HubSplit:
    """The split that `source` names. Raises :class:`DataError`, as all of its methods do, where it is not to be had."""
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
    """With the files in ``config.data_files``, by split: those of a folder or of the hub, else of the hub's cache on
    this machine."""
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
    except FileNotFoundError:  # nothing of it is in the cache, or no data
        if why and not builder:
            raise why from None
        return builder or load_dataset_builder(name, configuration or None)


def _check_shards(name: str, splits: dict[str, list[str]]) -> None:
    """The cache does not say what it lacks, but files that are numbered do."""
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
    """What ``datasets`` and huggingface_hub raise, in words."""
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
    except (
        ValueError,
        RuntimeError,
    ) as error:  # an unknown configuration, a card that is none, a script in place of data
        raise DataError(f"data set {source!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
