"""The Python packages that the lab's hosts install: fetched once, kept, and bound into every host read-only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from tests.lab.hosts import cache

ROOT = Path(__file__).parents[2]
_LOCKS = (ROOT / "requirements/nodes.txt", ROOT / "requirements/torch.txt")


def wheels() -> Path:
    """A folder with every wheel that python_runtime wants, complete. Raises RuntimeError with pip's words where one cannot be had."""
    folder = cache() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / ".complete"
    wanted = hashlib.sha256(b"".join(lock.read_bytes() for lock in _LOCKS)).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    _download(folder, "--require-hashes", "-r", str(_LOCKS[0]))
    _download(folder, "uv")
    # The version with its suffix names the CPU build, which make setup has found, and no other.
    torch = f"torch=={importlib.metadata.version('torch')}"
    if "+cpu" not in torch:
        raise RuntimeError(f"the lab wants a CPU build of torch, and .venv has {torch}: rm -r .venv and make setup")
    try:
        _download(folder, torch)
    except RuntimeError:
        _download(folder, "--index-url", os.environ.get("TORCH_INDEX_URL", "https://download.pytorch.org/whl/cpu"), torch)
    stamp.write_text(wanted)
    return folder


def _download(folder: Path, *what: str) -> None:
    """What is there already is not fetched again."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), *what], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"wheels for the lab: pip download {' '.join(what)}: {done.stderr.strip()[-2000:]}")
