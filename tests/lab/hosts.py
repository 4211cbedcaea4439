"""Throw-away hosts: systemd containers with SSH on a bridge of their own.

python -m tests.lab.hosts head worker1 worker2     # prints how to reach them; Ctrl-C takes them away

A host is a Debian root file system (made once, cached) under an overlay of its own, booted by systemd-nspawn: systemd
as PID 1, sshd, its own address, the outside through NAT. Root alone can do that; `missing` says what a machine lacks.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml

# On all hosts; the rest is what site.yml installs.
_PACKAGES = (
    "python3-apt,systemd,systemd-sysv,dbus,openssh-server,python3,iproute2,ca-certificates,sudo,procps,iputils-ping"
)
_SUITE = "bookworm"
_LABS = 16  # at once on one machine
_NEEDED = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "ssh": "openssh-client",
    "ip": "iproute2",
    "nft": "nftables",
}


def missing() -> str | None:
    """What this machine lacks to have hosts, in words; None where it lacks nothing."""
    if os.geteuid() != 0:
        return "the lab needs root: it boots containers and makes a bridge"
    lacking = [package for command, package in _NEEDED.items() if not shutil.which(command)]
    return f"the lab needs {', '.join(lacking)}: apt-get install {' '.join(lacking)}" if lacking else None


def cache() -> Path:
    """Where root file systems and wheels are kept between runs."""
    return Path(os.environ.get("LLM_RAY_TEST_CACHE") or Path.home() / ".cache" / "llm-ray-tests") / "lab"


def base(*extra: str) -> Path:
    """The root file system that hosts share, read-only; made where it is not cached. extra: packages beside those of
    all hosts."""
    folder = cache() / "-".join([f"{_SUITE}-3", *extra])
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    run(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--skip=cleanup/apt",
        f"--include={','.join([_PACKAGES, *extra])}",
        _SUITE,
        str(partial),
    )
    (partial / "etc/machine-id").write_text("")  # each host makes its own at boot
    for key in (partial / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    partial.rename(folder)
    return folder


@dataclass
class Network:
    """A bridge with its own addresses, which the outside is reached from through NAT."""

    number: int
    lock: int

    @property
    def prefix(self) -> str:
        return f"10.77.{self.number}"

    @property
    def bridge(self) -> str:
        return f"llmraylab{self.number}"

    @classmethod
    def make(cls) -> Network:
        """One that no other lab of this machine has. Raises RuntimeError where all are taken."""
        for number in range(_LABS):
            lock = os.open(f"/run/llm-ray-lab-{number}.lock", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            made = cls(number, lock)
            made._clear()  # what a killed lab left
            run("ip", "link", "add", made.bridge, "type", "bridge")
            run("ip", "addr", "add", f"{made.prefix}.1/24", "dev", made.bridge)
            run("ip", "link", "set", made.bridge, "up")
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            run("nft", f"add table ip {made.bridge}; add chain ip {made.bridge} post {{ type nat hook postrouting "
                f"priority 100; }}; "
                f"add rule ip {made.bridge} post ip saddr {made.prefix}.0/24 oifname != {made.bridge} "
                "masquerade")  # fmt: skip
            return made
        raise RuntimeError(f"{_LABS} labs are open on this machine already")

    def remove(self) -> None:
        self._clear()
        os.close(self.lock)

    def _clear(self) -> None:
        for cable in Path("/sys/class/net").glob(f"vb-{self.number}-*"):
            subprocess.run(["ip", "link", "del", cable.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)
        subprocess.run(["nft", f"delete table ip {self.bridge}"], check=False, capture_output=True)


@dataclass
class Host(abc.ABC):
    """A booted (or not yet booted) host."""

    name: str
    net: Network
    address: str
    folder: Path
    key: Path
    binds: dict[Path, str] = field(default_factory=dict)
    """Folders of this machine that the host sees read-only."""
    shares: dict[Path, str] = field(default_factory=dict)
    """Folders of this machine that the host may write to."""
    process: subprocess.Popen[bytes] | None = None
    packages: ClassVar[tuple[str, ...]] = ()
    """Beside those of all hosts."""
    patience: ClassVar[float] = 60
    """Seconds in which it has booted."""

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def machine(self) -> str:
        """Its name on this machine, where several labs may have a host of one name."""
        return f"{self.net.number}-{self.name}"

    @property
    def cable(self) -> str:
        """The interface of this machine that it hangs on."""
        return f"vb-{self.machine}"

    @property
    def known_hosts(self) -> Path:
        return self.folder.parent / "known_hosts"

    def prepare(self) -> None:
        """Its file system: the shared one under an overlay, an address, host keys, the tests' public key."""
        for part in ("upper", "work", "root"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        layers = f"lowerdir={base(*self.packages)},upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        (self.root / "etc/hostname").write_text(f"{self.name}\n")
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        network = self.root / "etc/systemd/network/10-lab.network"
        network.parent.mkdir(parents=True, exist_ok=True)
        network.write_text(
            f"[Match]\nName=host0 eth0\n[Network]\nAddress={self.address}/24\nGateway={self.net.prefix}.1\n"
        )
        wanted = self.root / "etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
        wanted.unlink(missing_ok=True)
        wanted.symlink_to("/lib/systemd/system/systemd-networkd.service")
        ssh = self.root / "root/.ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        (ssh / "authorized_keys").write_bytes(self.key.with_suffix(".pub").read_bytes())
        run("ssh-keygen", "-A", "-f", str(self.root))
        public = (self.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
        with self.known_hosts.open("a") as file:
            file.write(f"{self.address} {public[0]} {public[1]}\n")

    @abc.abstractmethod
    def command(self) -> list[str]:
        """What runs it on this machine until it is off."""

    def start(self) -> None:
        """Switch it on. It is gone with the tests, however they end."""
        command = ["setpriv", "--pdeathsig", "KILL", *self.command()]
        with (self.folder / "console.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def boot(self) -> None:
        """Start it, and wait until it can be reached and has booted."""
        self.start()
        self.wait()

    def wait(self) -> None:
        """Until systemd says that the host has booted."""
        began = time.monotonic()
        while (state := self.ssh("systemctl is-system-running", check=False).stdout.strip()) not in (
            "running",
            "degraded",
        ):
            if time.monotonic() - began > self.patience:
                said = (self.folder / "console.log").read_text(errors="replace")[-2000:]
                raise TimeoutError(
                    f"{self.name} did not boot within {self.patience:.0f} s ({state or 'no answer'}): {said}"
                )
            time.sleep(0.2)

    def ssh(self, command: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command on it as root."""
        options = ["-o", f"UserKnownHostsFile={self.known_hosts}", "-o", f"ConnectTimeout={self.patience / 30:.0f}"]
        options += ["-o", "BatchMode=yes", "-o", "LogLevel=ERROR"]
        line = ["ssh", *options, "-i", str(self.key), f"root@{self.address}", command]
        done = subprocess.run(
            line, check=False, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{self.name}: {command}: exit {done.returncode}: {done.stdout[-1000:]}{done.stderr[-1000:]}"
            )
        return done

    def kill(self) -> None:
        """As if its power were cut."""
        if self.process:
            _kill_tree(self.process.pid)
            self.process.wait()
            self.process = None

    def reboot(self) -> None:
        """Shut it down in order, and boot it again."""
        self.ssh("systemctl poweroff", check=False)
        if self.process:
            self.process.wait(self.patience)
        self.boot()

    def cut(self) -> None:
        """Pull its network cable."""
        run("ip", "link", "set", self.cable, "down")

    def plug(self) -> None:
        run("ip", "link", "set", self.cable, "up")

    def remove(self) -> None:
        self.kill()
        subprocess.run(["umount", "-l", str(self.root)], check=False, capture_output=True)
        subprocess.run(
            ["rm", "-rf", str(self.folder)], check=False
        )  # in a tenth of the time that Python takes for some 100,000 files


class Container(Host):
    """A host that shares this machine's kernel, booted by systemd-nspawn."""

    def prepare(self) -> None:
        super().prepare()
        (self.folder / "docker").mkdir()

    @property
    def control_groups(self) -> list[Path]:
        """Of this machine, in which the host's systemd makes those of its units. Hosts that shared one would take each
        other's away."""
        trees = [Path("/sys/fs/cgroup", name) for name in ("systemd", "unified", "")]
        return [tree / f"llm-ray-lab-{self.machine}" for tree in trees if (tree / "cgroup.procs").exists()]

    def start(self) -> None:
        for group in self.control_groups:
            group.mkdir(exist_ok=True)
        super().start()

    def kill(self) -> None:
        super().kill()
        for group in self.control_groups:  # whatever outlived systemd-nspawn
            for procs in group.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):  # it, or its group, has just ended
                    for pid in procs.read_text().split():
                        os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        super().remove()
        began = time.monotonic()
        while left := [group for group in self.control_groups if group.exists()]:
            for part in [*sorted(left[0].rglob("*/"), reverse=True), left[0]]:
                with contextlib.suppress(OSError):  # a process in it is ending still
                    part.rmdir()
            if time.monotonic() - began > 10:
                break
            time.sleep(0.05)

    def command(self) -> list[str]:
        groups = [str(group / "cgroup.procs") for group in self.control_groups]
        return [
            *("sh", "-c", f'for group in {" ".join(groups)}; do echo $$ > $group; done; exec "$@"', "sh"),
            *(
                "systemd-nspawn",
                "--quiet",
                "--boot",
                "--register=no",
                "--keep-unit",
                "-D",
                str(self.root),
                "-M",
                self.machine,
            ),
            f"--hostname={self.name}",
            f"--network-bridge={self.net.bridge}",
            "--capability=all",
            "--system-call-filter=@keyring bpf @mount",
            "--console=pipe",
            f"--bind={self.folder / 'docker'}:/var/lib/docker",  # an overlay cannot lie on an overlay
            *(f"--bind-ro={source}:{target}" for source, target in self.binds.items()),
            *(f"--bind={source}:{target}" for source, target in self.shares.items()),
        ]


class Lab:
    """Hosts on one bridge, and an inventory of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, Host] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.key = folder / "key"
        if not self.key.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        self.net = Network.make()

    def add(
        self,
        *names: str,
        kind: type[Host] = Container,
        binds: dict[Path, str] | None = None,
        shares: dict[Path, str] | None = None,
    ) -> list[Host]:
        """Boot hosts of these names (at most 9 characters each, for they become names of interfaces)."""
        new = []
        for name in names:
            address = f"{self.net.prefix}.{11 + len(self.hosts)}"
            host = kind(name, self.net, address, self.folder / name, self.key, binds or {}, shares or {})
            self.hosts[name] = host
            host.prepare()
            new.append(host)
        for host in new:
            host.start()
        for host in new:
            host.wait()
        return new

    def inventory(self, groups: Mapping[str, Sequence[str]], **variables: object) -> Path:
        """An inventory with the hosts in these groups, and variables for all of them."""
        common = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.folder / 'known_hosts'} -o ControlMaster=auto -o "
            "ControlPersist=60",
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        children = {
            group: {"hosts": {n: {"ansible_host": self.hosts[n].address} for n in names}}
            for group, names in groups.items()
        }
        folder = self.folder / "inventory"
        folder.mkdir(exist_ok=True)
        (folder / "hosts.yml").write_text(
            yaml.safe_dump({"all": {"vars": common | variables, "children": children}}, sort_keys=False)
        )
        return folder

    def close(self) -> None:
        for host in self.hosts.values():
            host.remove()
        self.hosts.clear()
        self.net.remove()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A lab that leaves nothing behind."""
    made = Lab(folder)
    try:
        yield made
    finally:
        made.close()


def run(*command: str) -> str:
    """Run a command of this machine; its standard output. Raises RuntimeError with what it said."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _kill_tree(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    if reason := missing():
        sys.exit(reason)
    made = Lab(Path(tempfile.mkdtemp(prefix="llm-ray-lab-")))
    try:
        made.add(*(arguments or ("head", "worker1", "worker2")))
        for host in made.hosts.values():
            print(f"{host.name}: ssh -i {made.key} -o UserKnownHostsFile={host.known_hosts} root@{host.address}")
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        made.close()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main(sys.argv[1:])
