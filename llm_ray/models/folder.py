"""Hugging Face model folders: whether one is whole, and what is in it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from llm_ray.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def check_folder(path: Path) -> None:
    """Raise ModelError, saying what is missing, unless `path` holds a whole model: configuration, tokenizer and all weights."""
    if not path.is_dir():
        raise ModelError(f"{path}: there is no such model folder")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path", "its base model")
        raise ModelError(f"{path} is a LoRA adapter, not a model: name the merged model (a run's output folder) or {base}")
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: set model.gguf_file, or import it (llm-ray model import {path / ggufs[0]})" if ggufs else ""
        raise ModelError(f"{path} has no config.json: it is not a Hugging Face model folder, or a half copied one{hint}")
    read_json(path / "config.json")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}): copy it from the model's source, or set model.tokenizer")
    for file in weight_files(path):
        _check_weights(file)


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a model folder. Raises ModelError when one is missing."""
    if (path / INDEX).is_file():
        names = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing or not names:
            raise ModelError(f"{path} is half a model: {INDEX} names {len(names)} files, of which {', '.join(missing[:3]) or 'none'} are missing. Copy or download it again")
        return [path / name for name in names]
    files = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(f"{path} has no weights ({SINGLE} or {INDEX}): copy or download the model again")
    return files


def weights_info(path: Path) -> tuple[int, str]:
    """Number of parameters and data type of a folder of safetensors, read from the files' headers."""
    parameters, sizes = 0, dict[str, int]()
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            for tensor in _header(file).values():
                count = 1
                for extent in tensor["shape"]:
                    count *= extent
                parameters += count
                sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + count
    most = max(sizes, key=lambda name: sizes[name], default="?")
    return parameters, _DTYPE_NAMES.get(most, most.lower())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file. Raises ModelError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. The model folder is damaged or half copied: copy it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object: the model folder is damaged")
    return value


def _check_weights(file: Path) -> None:
    if file.suffix != ".safetensors":
        return
    header = _header(file)
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
    wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    size = file.stat().st_size
    if size < wanted:
        raise ModelError(f"{file} is cut off: {size:,} of {wanted:,} bytes are there. Copy or download the model again")


def _header(file: Path) -> dict[str, Any]:
    # https://github.com/huggingface/safetensors#format: length of the header (u64), JSON header, tensors.
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length)) if length <= file.stat().st_size else None
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file} is no readable safetensors file ({error}): copy or download the model again") from error
    if header is None:
        raise ModelError(f"{file} is cut off in its header: copy or download the model again")
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}
