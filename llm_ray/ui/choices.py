"""Choices offered to a user, with readable names: data (own files, shared files, a hub id) and models."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ray.app.confs import beyond
from llm_ray.app.models import list_models
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import Paths
from llm_ray.datafiles import DATA_SUFFIXES, HUB_ID
from llm_ray.errors import ConfError, DataError
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role

if TYPE_CHECKING:
    from llm_ray.ui.screens import Site

_OWN, _SHARED = "my files/", "data/"


def data_choices(site: Site, visitor: Visitor) -> list[str]:
    """Returns the visitor's own files and those of the data folder."""
    folders = {_OWN: site.uploads.folder(visitor), _SHARED: Paths.of(site.home).data}
    return [
        prefix + path.name
        for prefix, folder in folders.items()
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and (path.suffix.lower() in DATA_SUFFIXES or (path.is_dir() and prefix == _SHARED))
    ]


def data_source(site: Site, visitor: Visitor, choice: str | None) -> str:
    """Returns the value of data.train for a choice: a file's path or a hub id. Raises DataError."""
    choice = (choice or "").strip()
    if not choice:
        raise DataError("Choose data, or upload a file, on the screen Data")
    for prefix, folder in ((_OWN, site.uploads.folder(visitor)), (_SHARED, Paths.of(site.home).data)):
        name = choice.removeprefix(prefix)
        if choice.startswith(prefix) and name and Path(name).name == name and (folder / name).exists():
            return str(folder / name)
    if choice.startswith((_OWN, _SHARED)) or not HUB_ID.fullmatch(choice):
        raise DataError(
            f"{choice} is neither one of your files, nor in the data folder, nor a hub data set (organisation/name)"
        )
    return choice


def data_choice(site: Site, visitor: Visitor, source: str) -> str:
    """Returns the choice for a conf's path or hub id. Raises DataError if the visitor has no such file."""
    path = Path(source)
    for prefix, folder in ((_OWN, site.uploads.folder(visitor)), (_SHARED, Paths.of(site.home).data)):
        if path.parent == folder or (source == path.name and (folder / source).exists()):
            return prefix + path.name
    if path.is_absolute():
        raise DataError(
            f"the conf names {path.name}, which is not one of your files: upload it on the screen Data, and choose it"
        )
    return source


def without_folders(site: Site, visitor: Visitor, text: str) -> str:
    """Returns the text with the paths of the visitor's files shortened to file names."""
    for folder in (site.uploads.folder(visitor), Paths.of(site.home).data):
        text = text.replace(f"{folder}/", "")
    return text


def data_settings(source: str) -> dict[str, str]:
    """Returns the settings that the data requires: plain text has no answers to learn."""
    return {"tuning.objective": "pretrain"} if source.endswith(".txt") else {}


def model_choices(site: Site) -> list[str]:
    """Returns the names of models that can be finetuned."""
    return [model.name for model in list_models(Paths.of(site.home)) if not model.problem]


def check_allowed(site: Site, visitor: Visitor, conf: FinetuneConf) -> None:
    """Raises ConfError if the conf reads files the visitor may not read or runs code that is not built in; admins may
    do both."""
    if visitor.role.covers(Role.ADMIN):
        return
    paths = Paths.of(site.home)
    wrong = beyond(conf, [site.uploads.folder(visitor), paths.data, paths.models, paths.runs], paths)
    if wrong:
        raise ConfError("; ".join(wrong) + ": this requires the role admin")


def name_of_run(data: str, taken: Collection[str]) -> str:
    """Returns an unused run name derived from the data's name."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "-", Path(data.rpartition("/")[2]).stem).strip("-").lower()[:50] or "run"
    return next(name for n in range(1, 10_000) if (name := stem if n == 1 else f"{stem}-{n}") not in taken)
