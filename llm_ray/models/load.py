"""Finding a model by what the conf calls it, and loading it and its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.conf.schema import Model, Paths
from llm_ray.errors import ModelError
from llm_ray.models.folder import check_folder, read_json, weights_info

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Location:
    """A model's folder on disk, or its id on the hub."""

    name: str
    folder: Path | None

    def __str__(self) -> str:
        return str(self.folder or self.name)


def resolve(base: str, paths: Paths) -> Location:
    """What `base` means: a folder, a name in the registry, an earlier run, or a hub id, in this order. Raises ModelError for none of them."""
    if base.startswith(("/", "~", ".")):
        folder = Path(base).expanduser().absolute()
        if not folder.is_dir():
            raise ModelError(f"model {base}: there is no folder {folder}")
        return Location(folder.name, folder)
    if "/" not in base:
        for folder in (paths.models / base, paths.runs / base / "output"):
            if folder.is_dir():
                return Location(base, folder)
        if (paths.runs / base).is_dir():
            raise ModelError(f"model {base} is a run without output: it has not finished its stage export (llm-ray runs show {base})")
    elif base.count("/") == 1 and not Path(base).is_dir():
        return Location(base, None)
    if Path(base).is_dir():
        return Location(Path(base).name, Path(base).absolute())
    known = sorted(p.name for folder in (paths.models, paths.runs) if folder.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    near = get_close_matches(base, known, n=3, cutoff=0.5) or known[:5]
    names = f" Did you mean {', '.join(near)}?" if near else ""
    raise ModelError(f"model {base}: neither a folder, nor in the registry {paths.models}, nor a run, nor a hub id (organisation/model).{names} To add one: llm-ray model import SOURCE --name NAME")


def load_tokenizer(model: Model, paths: Paths) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the conf's chat template if it has one, and a padding token. Raises ModelError."""
    from transformers import AutoTokenizer

    location = resolve(model.tokenizer or model.base, paths)
    options: dict[str, Any] = {"gguf_file": model.gguf_file} if model.gguf_file and not model.tokenizer else {}
    with _explained(location, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(location), revision=model.revision, trust_remote_code=model.trust_remote_code, **options)
    if model.chat_template:
        try:
            tokenizer.chat_template = model.chat_template.read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"model.chat_template: {model.chat_template} cannot be read: {error.strerror}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: Model, paths: Paths, dtype: torch.dtype) -> PreTrainedModel:
    """The base model, its weights in `dtype`. Raises ModelError."""
    from transformers import AutoModelForCausalLM, GgufConfig

    location = resolve(model.base, paths)
    if location.folder and not model.gguf_file:
        check_folder(location.folder)
    options: dict[str, Any] = {}
    if model.gguf_file:
        options = {"gguf_file": model.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    with _explained(location, "model"):
        loaded = AutoModelForCausalLM.from_pretrained(
            str(location), dtype=dtype, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
        )
    if model.gguf_file:
        forget_quantization(loaded)
    return loaded


def load_empty_model(model: Model, paths: Paths, dtype: torch.dtype) -> PreTrainedModel:
    """The base model's layers without memory for weights (torch's meta device). Raises ModelError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    location = resolve(model.base, paths)
    options: dict[str, Any] = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    with _explained(location, "model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(location), revision=model.revision, trust_remote_code=model.trust_remote_code, **options)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)


def stored_dtype(model: Model, paths: Paths) -> torch.dtype:
    """The data type in which the base model's weights are stored; fp32 where that is not told."""
    import torch
    from transformers import AutoConfig

    location = resolve(model.base, paths)
    if model.gguf_file:
        return torch.float32
    if location.folder:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(weights_info(location.folder)[1], torch.float32)
    with _explained(location, "model"):
        config = AutoConfig.from_pretrained(str(location), revision=model.revision, trust_remote_code=model.trust_remote_code)
    return config.dtype or torch.float32


def identity(model: Model, paths: Paths) -> dict[str, Any]:
    """What tells one base model from another: folder, files with their sizes and times, or hub id and revision."""
    location = resolve(model.base, paths)
    if location.folder is None:
        return {"hub_id": location.name, "revision": model.revision}
    files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(location.folder.iterdir()) if p.is_file() and p.suffix != ".md"}
    return {"folder": str(location.folder), "files": files}


def forget_quantization(model: PreTrainedModel) -> None:
    """Make a model that was read from a GGUF and dequantized an ordinary one, which can be trained and saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config


@contextlib.contextmanager
def _explained(location: Location, what: str) -> Iterator[None]:
    """Turn what transformers raises about a model into a ModelError for the user."""
    import os

    from huggingface_hub.errors import HFValidationError
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except MemoryError as error:
        raise ModelError(f"{what} {location}: not enough memory to load it") from error
    except (OSError, ValueError, KeyError, RuntimeError, HFValidationError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            reason = "it needs Python code of its own; read that code, then set model.trust_remote_code: true and add the model to model.trusted_models"
        elif location.folder:
            kind = read_json(location.folder / "config.json").get("model_type") if (location.folder / "config.json").is_file() else None
            reason = f"{reason} (model_type {kind})" if kind else reason
        elif os.environ.get("HF_HUB_OFFLINE") in ("1", "ON", "YES", "TRUE", "true"):
            reason = "it is not in the local cache, and HF_HUB_OFFLINE forbids asking the hub: download it where there is internet, or name a folder"
        else:
            reason = f"{reason}. No internet? Copy the model's folder here and name that"
        raise ModelError(f"{what} {location} cannot be loaded: {reason}") from error
