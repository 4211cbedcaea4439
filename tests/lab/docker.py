"""What hosts of the lab want before Docker can run in them, and the image that theirs is built on."""

from __future__ import annotations

import contextlib
import resource
import shutil
from pathlib import Path

from tests.lab.cluster import Cluster
from tests.lab.hosts import Host, cache, run

BASE = "llm-ray-base:lab"
VARIABLES = {
    "llm_ray_runtime": "docker",
    "ray_node_image_base": BASE,
    "ray_node_image_packages": "",
    # A machine in a sandbox may be unable to raise limits, and Docker then starts nothing.
    "host_base_nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
}
_SUITE = "bookworm"
_PACKAGES = "python3,python3-venv,libnuma1,libgoogle-perftools4,ca-certificates"
# A container of systemd-nspawn has the machine's cgroup trees (version 1) read-only; one in which there are groups
# cannot be remounted.
_CGROUPS = """\
[Unit]
Description=The machine's cgroup trees, writable for Docker
Before=docker.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'for tree in $(findmnt --noheadings --list --types cgroup --output TARGET); do case $tree in \
  */systemd) ;; \
  *) umount $tree; mount -t cgroup -o $(basename $tree) cgroup $tree ;; esac; done'

[Install]
WantedBy=multi-user.target
"""


def prepare(host: Host) -> None:
    """Docker can run in this host, also after it has been booted again."""
    host.ssh(
        f"cat > /etc/systemd/system/lab-cgroups.service <<'END'\n{_CGROUPS}\nEND\nsystemctl enable --now lab-cgroups"
    )


def base() -> Path:
    """A root file system with Python to build on, in place of a public image; made where it is not cached."""
    tar = cache() / "images" / f"{_SUITE}-1.tar"
    if not tar.exists():
        tar.parent.mkdir(parents=True, exist_ok=True)
        partial = tar.with_suffix(".partial.tar")
        run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(partial))
        partial.rename(tar)
    return tar


def import_base(cluster: Cluster) -> None:
    """Docker on all hosts, and on the head the base image that site.yml builds on, as if it had been pulled."""
    cluster.play("site.yml", "--tags", "host_base,docker_engine")
    shutil.copy(base(), cluster.lab.folder / "storage" / "base.tar")
    cluster.head.ssh(f"docker import /srv/llm-ray/base.tar {BASE}; rm /srv/llm-ray/base.tar")


def clear_cgroups() -> None:
    """Take away the groups that containers of hosts which are gone have left on this machine."""
    for tree in Path("/sys/fs/cgroup").glob("*/docker"):
        for group in sorted(tree.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):  # another lab's
                group.rmdir()
        with contextlib.suppress(OSError):
            tree.rmdir()
