"""Finds a model by its name in the conf, and loads it and its tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.conf.finetune import FewBits, Model
from llm_ray.conf.section import Paths
from llm_ray.errors import LlmRayError, ModelError
from llm_ray.models.complete import check_complete, refuse_missing
from llm_ray.models.folder import CONFIG, GENERATION, TEMPLATES, check_folder, check_tokenizer, read_json
from llm_ray.models.generation import mend
from llm_ray.models.tokens import open_tokenizer
from llm_ray.nearest import nearest_names

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_BLOCK = 1 << 20
TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
MADE_BY = "llm-ray.json"
LOADING = threading.RLock()
"""Lock for creating or loading a model with transformers, which temporarily replaces methods of its classes
(`tie_weights`) and torch's default data type. Another thread would get a broken model, and two overlapping loads would
leave the replacements in place."""


@dataclass(frozen=True)
class Location:
    """A model's folder on disk, or its id on the hub (`folder` is None)."""

    name: str
    folder: Path | None

    def __str__(self) -> str:
        return str(self.folder or self.name)


@dataclass(frozen=True)
class Base:
    """The base model of a conf, resolved: its section of the conf, and the locations of weights and tokenizer. Later
    steps use it, also on other hosts."""

    model: Model
    location: Location
    tokenizer: Location


def find_base(model: Model, paths: Paths) -> Base:
    """Returns the conf's model with its location and its tokenizer's. Raises ModelError if one is not found."""
    location = resolve(model.base, paths)
    return Base(model, location, resolve(model.tokenizer, paths) if model.tokenizer else location)


def resolve(base: str, paths: Paths) -> Location:
    """Resolves `base` as a folder, a name in the registry, an earlier run, or a hub id, in this order. Raises
    ModelError if it is none of them."""
    folder = Path(base).expanduser()
    explicit = folder.is_absolute() or base.startswith(("./", "../"))
    if folder.is_dir() and (explicit or (folder / CONFIG).is_file()):
        return Location(folder.name, folder.absolute())
    if explicit:
        raise ModelError(f"model {base}: no such folder")
    if "/" not in base:
        for place in (paths.models / base, paths.runs / base / "output"):
            if place.is_dir():
                return Location(base, place)
        if (paths.runs / base).is_dir():
            raise ModelError(
                f"model {base} is a run without a model: its stage export has not run (llm-ray runs show {base})"
            )
    elif base.count("/") == 1 and all(base.split("/")):
        return Location(base, None)
    registered = [place.name for place in paths.models.glob("*") if not place.name.startswith(".")]
    known = sorted([*registered, *(output.parent.name for output in paths.runs.glob("*/output"))])
    near = nearest_names(base, known, 3)
    hint = f"Did you mean {' or '.join(near)}? " if near else f"There are: {', '.join(known[:5])}. " if known else ""
    raise ModelError(
        f"model {base}: no such model in the registry ({paths.models}), and no such run ({paths.runs}). {hint}To add "
        f"one: llm-ray model import SOURCE --name {Path(base).name}; hub models are named organisation/model"
    )


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Returns the model's tokenizer, with the conf's chat template, if set, and a padding token. Raises ModelError."""
    model, location = base.model, base.tokenizer
    options: dict[str, Any] = {}
    if not model.tokenizer:
        options = {"revision": model.revision, **_gguf(base)}
    if location.folder and "gguf_file" not in options:
        check_tokenizer(location.folder)  # without vocabulary files, transformers may create an empty tokenizer
    with _explained(f"the tokenizer {location}", location):
        tokenizer = open_tokenizer(str(location), trust_remote_code=model.trust_remote_code, **options)
    if model.chat_template:
        try:
            tokenizer.chat_template = model.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ModelError(f"model.chat_template: {model.chat_template} cannot be read: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    base: Base, dtype: torch.dtype, bits: FewBits | None = None, keep: tuple[str, ...] = ()
) -> PreTrainedModel:
    """Returns the base model with all weights from its files, in `dtype`, ready to be saved. Raises ModelError if it is
    incomplete, quantized or unreadable.

    With `bits`, linear layers are packed while they are read (:mod:`llm_ray.models.fewbits`), except the output head and
    those named in `keep`: such a model can be trained with adapters, but not saved.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    check_model(base)
    model, location, options = base.model, base.location, _gguf(base)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True  # pickle can run code
    if bits:
        from llm_ray.models.fewbits import FewBitsConfig, check_few_bits

        check_few_bits(load_empty_model(base, dtype), location, bits, keep)
        options["quantization_config"] = FewBitsConfig(bits, keep)
    with _explained(f"the model {location}", location):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            str(location),
            dtype=dtype,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    refuse_missing(str(location), loaded, report["missing_keys"])
    if model.gguf_file or bits:
        forget_quantization(loaded)
    if getattr(loaded, "hf_quantizer", None):  # merging or saving would fail later
        raise ModelError(
            f"the model {location} keeps its weights quantized ({loaded.quantization_method}), so it cannot be "
            "finetuned and exported: use the model that it was quantized from"
        )
    if bits:
        for (
            weight
        ) in loaded.parameters():  # views of the mapped files: one of them keeps a file's other weights resident
            weight.data = weight.data.clone()
    mend_generation(loaded.generation_config, location)
    return loaded


def mend_generation(settings: GenerationConfig, location: Location) -> list[str]:
    """Corrects a model's generation settings so that they can be saved; returns the changes. Raises ModelError."""
    try:
        return mend(settings)
    except ValueError as error:
        raise ModelError(
            f"{location}: {GENERATION} could not be saved with the finetuned model: {error}. Correct it there"
        ) from error


def load_config(base: Base) -> PreTrainedConfig:
    """Returns the base model's configuration. Raises ModelError."""
    from transformers import AutoConfig

    with _explained(f"the model {base.location}", base.location):
        return AutoConfig.from_pretrained(
            str(base.location),
            revision=base.model.revision,
            trust_remote_code=base.model.trust_remote_code,
            **_gguf(base),
        )


def load_generation(base: Base) -> GenerationConfig | None:
    """Returns the base model's generation settings; None if it has no file for them. Raises ModelError."""
    from transformers import GenerationConfig

    location = base.location
    if base.model.gguf_file or (location.folder and not (location.folder / GENERATION).is_file()):
        return None
    with (
        _explained(f"{GENERATION} of the model {location}", location),
        contextlib.suppress(OSError),
    ):  # the hub has no such file
        return GenerationConfig.from_pretrained(str(location), revision=base.model.revision)
    return None


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether the model is a mixture of experts."""
    text = config.get_text_config()
    return any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def width_of(config: PreTrainedConfig) -> int:
    """Returns the model's hidden size."""
    text = config.get_text_config()
    return int(next(size for key in ("hidden_size", "d_model", "n_embd", "dim") if (size := getattr(text, key, None))))


def load_empty_model(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the base model without memory for its weights (torch's meta device). Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(base)
    with _explained(f"the model {base.location}", base.location), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=base.model.trust_remote_code)


def stored_dtype(base: Base) -> torch.dtype:
    """Returns the data type of the base model's stored weights; fp32 if unknown or quantized. Raises ModelError."""
    import torch

    if base.model.gguf_file:
        return torch.float32
    if base.location.folder:
        stored = check_folder(base.location.folder, tokenizer=False).dtype
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(stored, torch.float32)
    return load_config(base).dtype or torch.float32


def check_model(base: Base) -> None:
    """Raises ModelError if the base model is incomplete (hub models are not checked)."""
    if (folder := base.location.folder) and not _gguf(base):
        check_folder(folder, tokenizer=not base.model.tokenizer)
        check_complete(folder, causal=True, trust_remote_code=base.model.trust_remote_code)


def identity(base: Base) -> dict[str, Any]:
    """Returns what identifies a base model: its names in the conf, the few bits that its weights are trained in, if set,
    and, for a folder, its path and a fingerprint of its files."""
    model, folder = base.model, base.location.folder
    named: dict[str, Any] = {"base": model.base, "revision": model.revision, "gguf_file": model.gguf_file}
    named |= {"weights": model.weights} if model.weights else {}
    return named | ({"folder": str(folder), "fingerprint": fingerprint(folder)} if folder else {})


def tokenizer_files(base: Base) -> list[Path]:
    """Returns the local files that determine tokenization: the conf's chat template, and the tokenizer folder's files
    except weights. Hub ids have no local files; for a GGUF, :func:`identity` covers the file."""
    own = [base.model.chat_template] if base.model.chat_template else []
    if base.tokenizer.folder is None:
        return own
    listed = [
        p
        for folder in (base.tokenizer.folder, base.tokenizer.folder / TEMPLATES)
        if folder.is_dir()
        for p in sorted(folder.iterdir())
    ]
    return [*own, *(p for p in listed if p.is_file() and p.suffix in TOKENIZER_SUFFIXES and p.name != MADE_BY)]


def forget_quantization(model: PreTrainedModel) -> None:
    """Turns a model that was dequantized from a GGUF into an ordinary one that can be trained and saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config


def _gguf(base: Base) -> dict[str, Any]:
    """Returns the `from_pretrained` option for the conf's GGUF, if any. Raises ModelError if the file is missing."""
    wanted, folder = base.model.gguf_file, base.location.folder
    if not wanted:
        return {}
    if folder and not (folder / wanted).is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"model.gguf_file: {folder} has no {wanted}; its GGUF files: {found}")
    return {"gguf_file": wanted}


def fingerprint(folder: Path) -> str:
    """Returns a hash of a model folder's files, except README.md, llm-ray.json and hidden files."""
    digest = hashlib.sha256()
    for path in sorted(
        p
        for p in folder.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.name not in ("README.md", MADE_BY)
    ):
        digest.update(file_digest(path))
    return digest.hexdigest()


def file_digest(path: Path) -> bytes:
    """Returns a file's name, size, and first and last MiB: enough to distinguish trainings without reading all
    weights."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        sample = f"{path.name}\0{size}\0".encode()
        for start in (0, max(0, size - _BLOCK)):
            file.seek(start)
            sample += file.read(_BLOCK)
    return sample


@contextlib.contextmanager
def _explained(what: str, location: Location) -> Iterator[None]:
    """Raises ModelError, with a message for the user, for whatever transformers raises: damaged files can cause any
    exception."""
    try:
        with quietly(warnings_too=False):
            yield
    except LlmRayError:
        raise
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded: {_reason(error, location)}") from error


@contextlib.contextmanager
def quietly(warnings_too: bool = True) -> Iterator[None]:
    """Disables transformers' progress bars in the block, and its and Python's warnings if `warnings_too`.

    Holds LOADING, so one thread at a time.
    """
    from transformers.utils import logging

    with LOADING:
        bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                if warnings_too:
                    logging.set_verbosity_error()
                    warnings.simplefilter("ignore")
                yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _reason(error: Exception, location: Location) -> str:
    from huggingface_hub import constants

    text = str(error).strip()
    short = " ".join(text.split())[:300] or type(error).__name__
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        import psutil

        free = psutil.virtual_memory().available / 2**30
        return (
            f"not enough memory ({free:.1f} GiB are free): use a smaller model, model.dtype bf16, "
            "model.weights int8 or int4 for LoRA, or another host"
        )
    if "trust_remote_code" in text:
        return (
            "it has its own Python code. Read that code; if you trust it, set model.trust_remote_code: true and add "
            f"{location} to model.trusted_models"
        )
    if location.folder is None:
        if constants.HF_HUB_OFFLINE:
            return (
                "there is no such folder, and the hub model is not in the local cache, while HF_HUB_OFFLINE "
                "disables downloads: copy its folder to this machine and use that"
            )
        return (
            f"{short}. (There is no such folder either.) Without internet, copy its folder to this machine and use that"
        )
    kind = read_json(location.folder / CONFIG).get("model_type") if (location.folder / CONFIG).is_file() else None
    if kind and ("Unrecognized configuration class" in text or "Unrecognized model" in text):
        return (
            f"a model of type {kind} does not generate text (it is not in transformers' AutoModelForCausalLM): use a "
            "causal language model"
        )
    if kind and ("does not recognize this architecture" in text or "model type" in text):
        return f"transformers does not support models of type {kind}"
    if "ignore_mismatched_sizes" in text:
        return f"its weights differ in size from its {CONFIG}: one of them belongs to another model"
    return short + (f" (model type {kind})" if kind else "")
