"""Virtual machines among the lab's hosts: a kernel of their own, so NFS server and client are real, and so are reboots
and power cuts.

qemu without KVM, which the lab cannot count on: a machine boots in about half a minute and is some eight times slower
than a container.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tests.lab.hosts import Host, base, run
from tests.lab.hosts import missing as missing_for_containers

_DISK = "4G"  # sparse
_UNWANTED = (
    "getty.target",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_reap.service",
)  # nobody logs in there; the rest would take the machine's time


def missing() -> str | None:
    """What this machine lacks to have virtual machines, in words; None where it lacks nothing."""
    if reason := missing_for_containers():
        return reason
    lacking = [
        package
        for command, package in {"qemu-system-x86_64": "qemu-system-x86", "mkfs.ext4": "e2fsprogs"}.items()
        if not shutil.which(command)
    ]
    return f"the lab's machines need {', '.join(lacking)}: apt-get install {' '.join(lacking)}" if lacking else None


class Machine(Host):
    """A host with a kernel, a disk and a power switch of its own."""

    packages = ("linux-image-cloud-amd64",)
    patience = 300

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    def prepare(self) -> None:
        """A disk of its own from what all hosts are prepared with."""
        super().prepare()
        for unit in _UNWANTED:
            (self.root / "etc/systemd/system" / unit).symlink_to("/dev/null")
        run("mkfs.ext4", "-q", "-d", str(self.root), str(self.disk), _DISK)
        run("umount", str(self.root))
        shutil.rmtree(self.folder / "upper")

    def command(self) -> list[str]:
        boot = base(*self.packages) / "boot"
        (kernel,), (initrd,) = boot.glob("vmlinuz-*"), boot.glob("initrd.img-*")
        return [
            *(
                "qemu-system-x86_64",
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
                "-smp",
                "1",
                "-m",
                "1G",
                "-nodefaults",
                "-no-user-config",
            ),
            *("-display", "none", "-serial", "stdio", "-no-reboot", "-device", "virtio-rng-pci"),
            *("-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet mitigations=off"),
            # What the guest has written outlives qemu in this machine's page cache: no need to wait for this machine's
            # disk.
            *("-drive", f"file={self.disk},format=raw,if=virtio,cache=unsafe"),
            *("-netdev", f"tap,id=net,ifname={self.cable},script=no,downscript=no"),
            *(
                "-device",
                f"virtio-net-pci,netdev=net,mac=52:54:00:77:{self.net.number:02x}:{int(self.address.rpartition('.')[2]):02x}",
            ),
        ]

    def start(self) -> None:
        super().start()
        assert self.process
        while not Path("/sys/class/net", self.cable).exists():  # it is there as long as qemu is
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name}: qemu ended: {(self.folder / 'console.log').read_text()[-2000:]}")
            time.sleep(0.05)
        run("ip", "link", "set", self.cable, "master", self.net.bridge, "up")
