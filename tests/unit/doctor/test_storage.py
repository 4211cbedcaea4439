"""What doctor says of folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llm_ray.doctor.storage import Place, Trial, find_places, hub_cache, storage, try_folder
from llm_ray.host.facts import Mount

_GIB = 2**30
_NFS = Mount("/srv", "nfs4", "nas:/llm")


def _place(**changed: Any) -> Place:
    default = {
        "names": ["models", "runs"],
        "wanted": [Path("/srv/my models/models"), Path("/srv/my models/runs")],
        "folder": Path("/srv/my models"),
        "free": 50 * _GIB,
        "mount": Mount("/", "ext4", "/dev/vda"),
        "trial": Trial(uid=1000),
    }
    return Place(**default | changed)


@pytest.mark.parametrize(
    ("place", "user", "level", "text", "fix"),
    [
        (_place(), 1000, "ok", "/srv/my models, ext4: writable, 50.0 GiB free", ""),
        (_place(free=3 * _GIB), 1000, "note", "enough for small models", "du -xh --max-depth=2 '/srv/my models'"),
        (_place(free=2**20), 1000, "problem", "1 MiB free, at least 1 GiB is needed", "move them"),
        (_place(free=0, trial=Trial("No space left on device")), 1000, "problem", "No space left on device", "du -xh"),
        (_place(trial=Trial("Permission denied")), 1000, "problem", "cannot be written: Permission denied", "move them; or, if these are to be this user's, as root: install -d -o 1000 '/srv/my models/models' '/srv/my models/runs'"),
        (_place(trial=Trial("Permission denied"), mount=_NFS), 0, "problem", "cannot be written", "root_squash"),
        (_place(trial=Trial(uid=65534), mount=_NFS), 0, "note", "to uid 65534 (root_squash)", "sudo -u ray"),
        (_place(trial=Trial(uid=1000, locks=False), mount=_NFS), 1000, "problem", "cannot be locked", "rpc.statd"),
        (_place(mount=Mount("/", "tmpfs", "tmpfs")), 1000, "note", "lost when the machine restarts", "move them"),
    ],
)  # fmt: skip
def test_a_folder(place: Place, user: int, level: str, text: str, fix: str) -> None:
    found = storage(place, user, "move them")
    assert found.level == level
    assert text in found.text
    assert fix in found.fix
    assert bool(found.fix) == (level != "ok")


def test_folders_on_one_file_system_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    mounts = f"1 0 1:1 / / rw - ext4 /dev/a rw\n2 1 1:2 / {tmp_path}/models rw - xfs /dev/b rw\n"
    folders = {name: tmp_path / name for name in ("models", "runs", "data")}
    models, rest = find_places(folders, mounts)
    assert (models.names, models.mount.type) == (["models"], "xfs")
    assert (rest.names, rest.mount.type, rest.folder) == (["runs", "data"], "ext4", tmp_path)
    assert rest.wanted == [tmp_path / "runs", tmp_path / "data"]
    assert rest.trial == Trial(uid=os.geteuid())
    assert [*tmp_path.rglob("*")] == [tmp_path / "models"], "nothing stays"


def test_a_folder_that_takes_no_files() -> None:
    assert try_folder(Path("/proc")).error


def test_where_the_hub_keeps_files() -> None:
    home = Path("/home/me")
    assert hub_cache({}, home) == Path("/home/me/.cache/huggingface/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}, home) == Path("/c/huggingface/hub")
    assert hub_cache({"HF_HOME": "/hf", "XDG_CACHE_HOME": "/c"}, home) == Path("/hf/hub")
    assert hub_cache({"HF_HUB_CACHE": "/hub", "HF_HOME": "/hf"}, home) == Path("/hub")
