"""A cluster in the lab: hosts, their inventory, and playbooks run against them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.hosts import Container, Host, Lab, lab
from tests.lab.wheels import ROOT, wheels

# Of the bundle, what playbooks need: a copy, so that a file edited while the lab runs changes nothing in mid-test.
_BUNDLE = (
    "ansible.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "playbooks",
    "roles",
    "requirements",
    "llm_ray",
    "conf",
    "docker",
    "scripts",
)
_RECAP = re.compile(r"^(\S+)\s+: (ok=\d+ .*)$", re.M)


@dataclass(frozen=True)
class Run:
    """What a playbook did."""

    code: int
    output: str
    seconds: float
    hosts: dict[str, dict[str, int]]
    """Of each host ok, changed, unreachable, failed, skipped, rescued, ignored."""

    @property
    def changed(self) -> int:
        return sum(stats["changed"] for stats in self.hosts.values())

    def changes(self) -> list[str]:
        """The tasks that changed a host, to be shown where none should have."""
        task, found = "", []
        for line in self.output.splitlines():
            if match := re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\]", line):
                task = match[1]
            elif line.startswith("changed: "):
                found.append(f"{task}: {line[9:]}")
        return found


@dataclass
class Cluster:
    """Hosts of one lab and the inventory that names them; `hosts["head"].ssh(...)` runs a command on one."""

    lab: Lab
    bundle: Path
    """A copy of the bundle, which a test may change."""
    groups: Mapping[str, Sequence[str]]
    variables: dict[str, Any]

    @property
    def hosts(self) -> dict[str, Host]:
        return self.lab.hosts

    @property
    def head(self) -> Host:
        return self.hosts[self.groups["ray_head"][0]]

    @property
    def workers(self) -> list[Host]:
        return [self.hosts[name] for name in self.groups["ray_workers"]]

    @property
    def nodes(self) -> list[Host]:
        return [self.head, *self.workers]

    def play(self, playbook: str, *arguments: str, ok: bool = True, timeout: float = 1800, **environment: str) -> Run:
        """Run a playbook; `ok`: it has to succeed, else AssertionError with the end of what it said."""
        process = self.start(playbook, *arguments, **environment)
        began = time.monotonic()
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        run = Run(process.returncode, output, time.monotonic() - began, self.parse(output))
        print(f"ansible-playbook {playbook} {' '.join(arguments)}: exit {run.code}, {run.seconds:.0f} s, {run.hosts}")
        if ok and run.code:
            raise AssertionError(f"{playbook} {' '.join(arguments)}: exit {run.code}\n{output[-8000:]}")
        return run

    def start(self, playbook: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Begin a playbook, for tests that do something to hosts meanwhile; what it says is on its stdout."""
        inventory = self.lab.inventory(self.groups, **self.variables)
        home = self.lab.folder / "home"  # Ansible's caches and sockets, apart from those of other labs
        home.mkdir(exist_ok=True)
        own = {
            "HOME": str(home),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CONFIG": str(self.bundle / "ansible.cfg"),
            "PYTHONUNBUFFERED": "1",
        }
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(inventory), playbook, *arguments]
        return subprocess.Popen(
            command, cwd=self.bundle, env=os.environ | own | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def cut_off(self, playbook: str, *arguments: str, at: str) -> None:
        """Begin a playbook, and kill it when it comes to the task whose name begins so."""
        run = self.start(playbook, *arguments)
        assert run.stdout
        for line in run.stdout:
            if line.startswith(f"TASK [{at}"):
                run.kill()
        run.wait()

    @staticmethod
    def parse(output: str) -> dict[str, dict[str, int]]:
        """Of each host in a playbook's recap ok, changed, unreachable, failed, skipped, rescued, ignored."""
        recap = _RECAP.findall(output)
        return {
            name: {key: int(value) for key, value in (pair.split("=") for pair in stats.split())}
            for name, stats in recap
        }

    def ray(self, code: str, host: Host | None = None, timeout: float = 120) -> str:
        """Run Python as a Ray client on a host (the head) with the cluster's own environment and token; what it
        prints."""
        line = f"set -a; . /etc/llm-ray/ray.env; cd /tmp; /opt/llm-ray/current/bin/python - <<'END'\n{code}\nEND\n"
        return (host or self.head).ssh(line, timeout=timeout).stdout

    def alive(self) -> dict[str, dict[str, Any]]:
        """Ray's live nodes by address, as the head knows them."""
        import json

        code = "import json, ray\nray.init(log_to_driver=False, logging_level='error')\nprint('NODES', json.dumps(ray.nodes()))"
        said = self.ray(code).rpartition("NODES ")[2]
        return {node["NodeManagerAddress"]: node for node in json.loads(said) if node["Alive"]}

    def wait_for_nodes(self, hosts: Sequence[Host], timeout: float = 240) -> None:
        """Until exactly these hosts are Ray's live nodes."""
        wanted, began, said = {host.address for host in hosts}, time.monotonic(), ""
        while time.monotonic() - began < timeout:
            try:
                found = set(self.alive())
            except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:  # the head is starting
                said = str(error)[-500:]
                continue
            said = f"Ray has {sorted(found)}"
            if found == wanted:
                return
        raise AssertionError(f"after {timeout:.0f} s Ray should have the nodes {sorted(wanted)}: {said}")


def copy_bundle(folder: Path) -> None:
    """What playbooks need of the bundle, into a new folder."""
    folder.mkdir()
    for source in (*(ROOT / name for name in _BUNDLE), *ROOT.glob("*.yml")):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / source.name)


@contextlib.contextmanager
def cluster(groups: Mapping[str, Sequence[str]], kind: type[Host] = Container, **variables: Any) -> Iterator[Cluster]:
    """Bare hosts with these groups, on shared storage of this machine; all is gone at the end.

    kind: of the hosts. variables: of the inventory, beside those that every lab has.
    """
    folder = Path(tempfile.mkdtemp(prefix="llm-ray-lab-"))
    with lab(folder) as made:
        bundle, storage = folder / "bundle", folder / "storage"
        storage.mkdir()
        copy_bundle(bundle)
        names = list(dict.fromkeys(name for members in groups.values() for name in members))
        made.add(
            *names,
            kind=kind,
            binds={wheels(variables.get("llm_ray_profile", "stock")): "/srv/wheels"},
            shares={storage: "/srv/llm-ray"},
        )
        common = {
            "llm_ray_storage": "existing", "llm_ray_wheel_source": "/srv/wheels", "ray_node_object_store_gib": 0.2,
            "ray_node_cpus": 2, "ray_node_drain_seconds": 10,
        }  # fmt: skip
        yield Cluster(made, bundle, groups, common | variables)
