"""Hugging Face model folders: completeness checks and contents."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.errors import ModelError

CONFIG = "config.json"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
"""Folder next to a tokenizer's files with chat templates other than the default."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OPENVINO = "openvino_model.xml"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
)
LFS_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, which stands in for the real file."""
_DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class Weights:
    """Number of parameters of a model, and the data type of most of them."""

    parameters: int
    dtype: str


def check_folder(path: Path, tokenizer: bool = True) -> Weights:
    """Returns the weights of the model folder `path`. Raises ModelError, naming what is missing, if it is incomplete.

    A complete folder has a configuration, a tokenizer (unless `tokenizer` is False), and every weight file at full
    length.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder")
    if not (path / CONFIG).is_file():
        raise ModelError(_without_config(path))
    _check_json(path, CONFIG, GENERATION)
    if tokenizer:
        check_tokenizer(path)
    counts = Counter[str]()
    files = _weight_files(path)
    places = {tensor: file for file, wanted in files.items() for tensor in wanted}
    for file, wanted in files.items():
        tensors = _tensors(file)
        if missing := sorted(wanted - tensors.keys()):
            raise ModelError(
                f"{file} lacks {len(missing)} of the tensors that {INDEX} names, such as {missing[0]}: copy or "
                "download the model again"
            )
        if twice := sorted(name for name in tensors if places.get(name, file) != file):
            raise ModelError(
                f"{file} contains {twice[0]} too, which {INDEX} assigns to {places[twice[0]].name}: it may belong to "
                "another model; copy or download the model again"
            )
        for size, dtype in tensors.values():
            counts[dtype] += size
    most = counts.most_common(1)[0][0] if counts else "none"
    return Weights(counts.total(), _DTYPE_NAMES.get(most, most.lower()))


def check_tokenizer(path: Path) -> None:
    """Raises ModelError unless the folder `path` has a tokenizer's vocabulary and readable tokenizer settings."""
    if not any(next(path.glob(name), None) for name in VOCABULARIES):
        raise ModelError(
            f"{path} has no tokenizer ({', '.join(VOCABULARIES[:3])}): copy it from the model's source, or set "
            "model.tokenizer to another folder"
        )
    _check_json(path, "tokenizer_config.json", "tokenizer.json")


def weight_files(path: Path) -> list[Path]:
    """Returns the weight files of a model folder. Raises ModelError if one is missing."""
    return list(_weight_files(path))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a model's file. Raises ModelError if it cannot be read or is not an object."""
    try:
        _check_pointer(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"{path} cannot be read: {reason}. The model folder is damaged or incomplete: copy it again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not contain a JSON object. The model folder is damaged: copy it again")
    return value


def _check_json(path: Path, *names: str) -> None:
    for name in names:
        if (path / name).exists():
            read_json(path / name)


def _without_config(path: Path) -> str:
    """Returns why `path` has no config.json, judging by its other files."""
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        return f"{path} is a LoRA adapter, not a model: use the merged model (a run's output folder), or {base}"
    if ggufs := sorted(path.glob("*.gguf")):
        return (
            f"{path} contains a GGUF, but no {CONFIG}: set model.gguf_file: {ggufs[0].name}, or import it (llm-ray "
            f"model import {ggufs[0]})"
        )
    return f"{path} has no {CONFIG}: it is not a Hugging Face model folder, or is incomplete"


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """Returns each weight file with the tensors that the index assigns to it (an empty set without an index)."""
    if (path / SINGLE).is_file() and not (path / INDEX).is_file():
        _check_alone(path, (file.name for file in path.glob("*.safetensors")))
        return {path / SINGLE: set()}
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{path / INDEX} names no weights: copy or download the model again")
        if elsewhere := sorted({str(name) for name in weight_map.values() if Path(str(name)).name != str(name)}):
            raise ModelError(
                f"{path / INDEX} names {elsewhere[0]}, which is in another folder, where some engines do not look: "
                f"move it into {path} and correct the index"
            )
        if (path / SINGLE).is_file():
            _check_alone(path, map(str, weight_map.values()), f", which {INDEX} names")
        files: dict[Path, set[str]] = {}
        for tensor, name in sorted(weight_map.items(), key=lambda item: str(item[1])):
            files.setdefault(path / str(name), set()).add(tensor)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"{path} is incomplete: of the {len(files)} files that {INDEX} names, {len(missing)} are missing "
                f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): copy or download the model again"
            )
        return files
    if (path / OPENVINO).is_file():
        raise ModelError(
            f"{path} contains a model in OpenVINO form, which only engine openvino reads: use the model that it was "
            "made from"
        )
    if pickles := sorted(path.glob("*.bin")):
        raise ModelError(
            f"{path} stores its weights as pickle ({pickles[0].name}), which can run code when loaded. If you trust "
            "them, save them as safetensors with transformers' save_pretrained, and use that folder"
        )
    raise ModelError(f"{path} has no weights ({SINGLE}, or {INDEX} and its files): copy or download the model again")


def _check_alone(path: Path, names: Iterable[str], hint: str = "") -> None:
    """Raises ModelError if other weights lie next to model.safetensors: engines differ in which they read."""
    if others := sorted(set(names) - {SINGLE}):
        raise ModelError(
            f"{path} contains its weights twice: {SINGLE}, and {len(others)} other file(s){hint} ({others[0]}). "
            "Engines differ in which they read: remove those that do not belong to the model"
        )


def _check_pointer(path: Path) -> None:
    """Raises ModelError if the file is a Git LFS pointer."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                f"{path} is damaged or truncated: it is a Git LFS pointer. Fetch the file (git lfs pull), or "
                "download the model again"
            )


def _tensors(file: Path) -> dict[str, tuple[int, str]]:
    """Returns the number of elements and data type of each tensor, from the header. Raises ModelError if the file is
    damaged or truncated."""
    from safetensors import SafetensorError, safe_open

    _check_pointer(file)
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
            return {name: (math.prod(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} is damaged or truncated ({file.stat().st_size:,} bytes; {error}): copy or download the model again"
        ) from error
