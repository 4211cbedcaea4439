"""A conf for a remote cluster: rendered and validated on the machine that Ansible runs on, with the files to upload.

    to = Destination(Path("/srv/llm-ray"))
    conf = finetune_for_cluster("cluster", ["train=tickets.jsonl", "data.upload=true"], {"hosts": 2}, to)
    conf.text      # as the cluster reads it: YAML with every key
    conf.files     # to be copied to the shared storage first

Paths are the cluster's and are not checked here, except in sections with `upload: true`, whose paths are on this
machine. These become paths on the shared storage named by content hash, so that an unchanged file is copied once and a
changed one never replaces it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_ray.conf import yamltext
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.keys import FINETUNE, SERVE, C, Keys
from llm_ray.conf.load import FinetuneValidation, ServeValidation, dump, load
from llm_ray.conf.section import Section, home
from llm_ray.conf.serve import ModelServing, ServeConf
from llm_ray.conf.validate import MODEL_FILES, Validation, dotted, safely
from llm_ray.datafiles import DATA_SUFFIXES, HUB_ID, is_task_path
from llm_ray.nearest import nearest_names

_UPLOADS = "data/uploads"


@dataclass(frozen=True)
class Destination:
    """The cluster that a conf is for."""

    home: Path
    """LLM_RAY_HOME of the cluster, on the shared storage."""
    nodes: str = "any"
    """Runtime of its nodes: bare_metal, docker, or any if unknown."""
    hosts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Addresses by host and group name of the inventory."""


@dataclass(frozen=True)
class Upload:
    """A file or folder on this machine, and its path on the shared storage."""

    key: str
    source: Path
    target: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class ClusterConf:
    """A conf as the cluster reads it."""

    conf: Section
    files: tuple[Upload, ...]

    @property
    def text(self) -> str:
        return dump(self.conf)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def finetune_for_cluster(
    config: str | Path, overrides: Sequence[str], variables: Mapping[str, Any], to: Destination
) -> ClusterConf:
    """Returns the conf of a finetune. `variables` are the template's, `overrides` as after ``--set``. Raises
    :class:`ConfError`."""
    return _for_cluster(FINETUNE, _Finetune, config, overrides, variables, to)


def serve_for_cluster(
    config: str | Path, overrides: Sequence[str], variables: Mapping[str, Any], to: Destination
) -> ClusterConf:
    """Returns the conf of an endpoint; otherwise like :func:`finetune_for_cluster`."""
    return _for_cluster(SERVE, _Serve, config, overrides, variables, to)


def _for_cluster(
    keys: Keys[C],
    kind: type[_ForCluster],
    config: str | Path,
    overrides: Sequence[str],
    variables: Mapping[str, Any],
    to: Destination,
) -> ClusterConf:
    files: list[Upload] = []
    runtime = ["runtime.mode=cluster", "runtime.address=auto"]
    conf = load(
        keys, lambda *arguments: kind(to, files, *arguments), config, [*overrides, *runtime], variables, to.home
    )
    return ClusterConf(conf, tuple(files))


def digest(source: Path) -> tuple[str, int]:
    """Returns SHA-256 and size in bytes of a file. For a folder, the SHA-256 is that of `sha256sum`'s output for its
    files in the order of their names."""
    if source.is_file():
        with source.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest(), source.stat().st_size
    lines, size = [], 0
    files = (Path(folder, name) for folder, _, names in os.walk(source, followlinks=True) for name in names)
    for name, file in sorted((file.relative_to(source).as_posix(), file) for file in files):
        sha256, length = digest(file)
        lines.append(f"{sha256}  {name}\n")
        size += length
    return hashlib.sha256("".join(lines).encode()).hexdigest(), size


class _ForCluster(Validation[Any]):
    """Validation with paths of another machine."""

    def __init__(self, to: Destination, files: list[Upload], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.to, self.files = to, files

    def uploads(self, path: yamltext.Path) -> bool:
        """Returns whether the file named at `path` is on this machine."""
        section = path[:2] if path[0] == "models" else ("data",) if path[0] == "evaluation" else path[:1]
        node: Any = self.data
        for part in section:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        return isinstance(node, dict) and node.get("upload") is True

    def add(self, path: yamltext.Path, source: Path) -> str:
        """Adds a file or folder on this machine to the uploads and returns its path on the shared storage."""
        sha256, size = digest(source)
        target = posixpath.join(str(self.to.home), _UPLOADS, sha256[:16], source.name)
        self.files.append(Upload(dotted(path), source, target, sha256, size))
        return target

    def path(self, path: yamltext.Path, name: str) -> str:
        if self.uploads(path):
            found = Path(super().path(path, name))
            if safely(found.is_file):
                return self.add(path, found)
            self.complain(path, f"{dotted(path)}: no such file on this machine: {found}")
        elif not name.startswith("/"):
            self.complain(path, f"{dotted(path)} is {name}: {self._where(path)}")
        return name

    def must_be_file(self, path: yamltext.Path, file: Path | None) -> None:
        """Left to the cluster."""

    def folder(self, path: yamltext.Path, name: str, files: tuple[str, ...] = MODEL_FILES) -> str:
        if not self.uploads(path):
            if name.startswith(("./", "../", "~")):
                self.complain(path, f"{dotted(path)} is {name}: {self._where(path)}")
            return name
        found = Path(super().folder(path, name, files))
        own = [home() / "models" / name, home() / "runs" / name / "output"]
        places = [found] if found.is_absolute() else own if "/" not in name else []
        folder = next((place for place in places if safely(place.is_dir)), None)
        return self.add(path, folder) if folder else name

    def _where(self, path: yamltext.Path) -> str:
        upload = ".".join([*map(str, path[:2] if path[0] == "models" else path[:1]), "upload"])
        hint = f", or set {upload}: true if it is on this machine" if self.keys.key(tuple(upload.split("."))) else ""
        return f"the cluster cannot see this machine's folders: write an absolute path on its hosts{hint}"


class _Finetune(_ForCluster, FinetuneValidation):
    def resolve(self, conf: FinetuneConf) -> FinetuneConf:
        conf = super().resolve(conf)
        self._check_nodes(conf)
        hosts = tuple(dict.fromkeys(address for name in conf.runtime.hosts for address in self._addresses(name)))
        return conf.model_copy(
            update={
                "runtime": conf.runtime.model_copy(update={"hosts": hosts}),
                "data": conf.data.model_copy(update={"upload": False}),
                "model": conf.model.model_copy(update={"upload": False}),
            }
        )

    def data_file(self, path: yamltext.Path, name: str, data: Path) -> str:
        if self.uploads(path):
            found = super().data_file(path, name, data)
            return self.add(path, Path(found)) if Path(found).is_absolute() and safely(Path(found).exists) else found
        entry = Path(name)
        if entry.is_absolute() or (HUB_ID.fullmatch(name) and entry.suffix.lower() not in DATA_SUFFIXES):
            return name
        if name.startswith(("./", "../", "~")) or not name.strip():
            self.complain(path, f"{dotted(path)} is {name or 'empty'}: {self._where(path)}")
        return str(data / name)

    def task(self, path: yamltext.Path, name: str, data: Path) -> str:
        if not is_task_path(name):
            return super().task(path, name, data)
        if self.uploads(path):
            found = Path(super().task(path, name, data))
            if found.is_absolute() and safely(found.is_file):  # with what it reads, which lies beside it
                return posixpath.join(self.add(path, found.parent), found.name)
            return self.add(path, found) if found.is_absolute() and safely(found.is_dir) else str(found)
        if not name.startswith("/"):
            self.complain(path, f"{dotted(path)} is {name}: {self._where(path)}")
        return name

    def processor(self, name: str | None) -> str | None:
        file, _, attribute = (name or "").rpartition(":")
        path = ("data", "processor")
        if self.uploads(path):
            found = super().processor(name)
            place = Path((found or "").rpartition(":")[0])
            return f"{self.add(path, place)}:{attribute}" if place.suffix == ".py" and safely(place.is_file) else found
        if file.endswith(".py") and not file.startswith("/"):
            self.complain(path, f"data.processor is {name}: {self._where(path)}")
        return name

    def _check_nodes(self, conf: FinetuneConf) -> None:
        if "any" not in (wanted := conf.runtime.nodes, self.to.nodes) and wanted != self.to.nodes:
            self.complain(
                ("runtime", "nodes"),
                f"runtime.nodes is {wanted}, but the cluster's nodes run as {self.to.nodes} (ray_node_runtime): set "
                "any",
            )

    def _addresses(self, name: str) -> Sequence[str]:
        """Returns the addresses of a host or group in the inventory; an address itself is returned unchanged."""
        known = [*self.to.hosts]
        if not known or name in known:
            return self.to.hosts.get(name, [name])
        if name in {address for addresses in self.to.hosts.values() for address in addresses}:
            return [name]
        nearest = nearest_names(name, known)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(known)}"
        self.complain(("runtime", "hosts"), f"runtime.hosts: the inventory has no Ray node or group {name}; {hint}")
        return [name]


class _Serve(_ForCluster, ServeValidation):
    def resolve(self, conf: ServeConf) -> ServeConf:
        conf = super().resolve(conf)
        return conf.model_copy(
            update={"models": {name: self._without_upload(model) for name, model in conf.models.items()}}
        )

    @staticmethod
    def _without_upload(model: ModelServing) -> ModelServing:
        return model.model_copy(update={"upload": False})
