"""The folders of models, runs and data, of temporary files, and of the hub cache."""

from __future__ import annotations

import fcntl
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_ray.doctor.finding import Finding, gib
from llm_ray.host import facts, rules

_GROUP = "Storage"
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "beegfs", "glusterfs")


@dataclass(frozen=True)
class Trial:
    """The outcome of writing a file."""

    error: str = ""
    """Why the folder cannot be written; empty if it can."""
    uid: int = 0
    """Owner of the written file; differs from the writer if a server maps users."""
    locks: bool = True
    """Whether files can be locked, which runs and conversions need."""


@dataclass(frozen=True)
class Place:
    """Folders on the same file system with the same outcome of writing."""

    names: Sequence[str]
    wanted: Sequence[Path]
    """The folders; `folder` is the first of them, or its nearest existing parent."""
    folder: Path
    free: int
    """In bytes."""
    mount: facts.Mount
    trial: Trial


def try_folder(folder: Path) -> Trial:
    """Writes, locks and removes a file of 64 KiB."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llm-ray-doctor-") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
            uid = os.fstat(file.fileno()).st_uid
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return Trial(uid=uid, locks=False)
            return Trial(uid=uid)
    except OSError as error:
        return Trial(error=error.strerror or str(error))


def find_places(folders: Mapping[str, Path], mounts: str) -> list[Place]:
    """Groups folders, existing or not, by file system and outcome of writing.

    `mounts` is the text of /proc/self/mountinfo.
    """
    found: dict[tuple[facts.Mount, Trial], dict[str, Path]] = {}
    for name, folder in folders.items():
        there = facts.existing(folder).resolve()
        key = facts.mount_of(there, mounts), try_folder(there)
        found.setdefault(key, {})[name] = folder
    places = []
    for (mount, trial), wanted in found.items():
        there = facts.existing(next(iter(wanted.values()))).resolve()
        places.append(Place([*wanted], [*wanted.values()], there, facts.free_disk(there), mount, trial))
    return places


def storage(place: Place, user: int, move: str) -> Finding:
    """Checks a place. `user` is the writer's id; `move` says how to relocate the folders."""
    check, where = ", ".join(place.names), f"{place.folder}, {place.mount.type}"
    network = place.mount.type in _NETWORK
    values = {
        "folder": str(place.folder),
        "free": place.free,
        "type": place.mount.type,
        "mount": place.mount.point,
        "network": network,
    }

    def problem(text: str, fix: str) -> Finding:
        return Finding(_GROUP, check, "problem", f"{where}: {text}", fix, values)

    quoted = shlex.quote(str(place.folder))
    if place.free / rules.GIB < rules.needed_disk(installed=True):
        text = f"{gib(place.free)} free, at least {rules.INSTALLED_DISK_GIB} GiB is needed"
        if place.trial.error:
            text += f" (and it cannot be written: {place.trial.error})"
        return problem(text, f"remove what is not needed (du -xh --max-depth=2 {quoted} | sort -h | tail), or {move}")
    if place.trial.error:
        text = f"cannot be written: {place.trial.error}"
        if network and user == 0:
            fix = f"root has no rights there (root_squash): run as the user that owns {place.folder}, or {move}"
        else:
            wanted = shlex.join(map(str, place.wanted))
            fix = f"{move}; or, if these are to be this user's, as root: install -d -o {user} {wanted}"
        return problem(text, fix)
    if not place.trial.locks:
        fix = "mount it with locks (nfs: without nolock, and with rpc.statd for version 3; lustre: -o flock)"
        return problem("files there cannot be locked, as runs are", fix)
    if place.trial.uid != user:
        text = f"the server gives what this user writes to uid {place.trial.uid} (root_squash): others cannot read or delete it"
        fix = f"run llm-ray as the user that owns {place.folder}, on a cluster as ray: sudo -u ray -H llm-ray …"
        return Finding(_GROUP, check, "note", f"{where}: {text}", fix, values)
    text = f"{where}: writable, {gib(place.free)} free"
    if place.mount.type in ("tmpfs", "ramfs"):
        fix = f"for what is to stay, {move}"
        return Finding(_GROUP, check, "note", f"{text}, in memory and lost when the machine restarts", fix, values)
    if place.free / rules.GIB < rules.MIN_DISK_GIB:
        fix = f"before larger models, make room (du -xh --max-depth=2 {quoted} | sort -h | tail), or {move}"
        return Finding(_GROUP, check, "note", f"{text}: enough for small models", fix, values)
    return Finding(_GROUP, check, "ok", text, values=values)


def hub_cache(environ: Mapping[str, str], home: Path) -> Path:
    """Returns the cache folder of huggingface_hub. `home` is the user's home folder."""
    if named := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named).expanduser().absolute()
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environ.get("HF_HOME") or cache / "huggingface").expanduser().absolute() / "hub"
