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
"""Held while transformers makes or loads a model: it replaces methods of its classes meanwhile (`tie_weights`), and
torch's default data type, with which another thread would make half a model; two that overlap leave them replaced for
good."""


@dataclass(frozen=True)
class Location:
    """A model's folder on disk, or (`folder` is None) its id on the hub."""

    name: str
    folder: Path | None

    def __str__(self) -> str:
        return str(self.folder or self.name)


@dataclass(frozen=True)
class Base:
    """The model that a conf names, found: its section of the conf, and where weights and tokenizer are. All that follows
    takes it, on other hosts too."""

    model: Model
    location: Location
    tokenizer: Location


def find_base(model: Model, paths: Paths) -> Base:
    """Where the model of a conf is, and its tokenizer. Raises ModelError where one is not."""
    location = resolve(model.base, paths)
    return Base(model, location, resolve(model.tokenizer, paths) if model.tokenizer else location)


def resolve(base: str, paths: Paths) -> Location:
    """What `base` means: a folder, a name in the registry, an earlier run, or a hub id, in this order. Raises
    ModelError for none."""
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
    """The model's tokenizer, with the conf's chat template if it has one, and a padding token. Raises ModelError."""
    model, location = base.model, base.tokenizer
    options: dict[str, Any] = {}
    if not model.tokenizer:
        options = {"revision": model.revision, **_gguf(base)}
    if location.folder and "gguf_file" not in options:
        check_tokenizer(location.folder)  # without files transformers may make an empty one
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
    """The base model, its weights in `dtype`, every one of them from its files; as it is, it can be saved. Raises
    ModelError.

    With `bits`, its linear layers but the output head and those called as in `keep` are packed while they are read
    (:mod:`llm_ray.models.fewbits`): such a model can be trained with adapters, but not saved.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    check_model(base)
    model, location, options = base.model, base.location, _gguf(base)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True  # pickle may run code
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
    if getattr(loaded, "hf_quantizer", None):  # which would show when they are to be merged or saved
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
    """Make a model's generation settings such that they can be saved; returns what was changed. Raises ModelError."""
    try:
        return mend(settings)
    except ValueError as error:
        raise ModelError(
            f"{location}: {GENERATION} could not be saved with the finetuned model: {error}. Correct it there"
        ) from error


def load_config(base: Base) -> PreTrainedConfig:
    """The base model's configuration. Raises ModelError."""
    from transformers import AutoConfig

    with _explained(f"the model {base.location}", base.location):
        return AutoConfig.from_pretrained(
            str(base.location),
            revision=base.model.revision,
            trust_remote_code=base.model.trust_remote_code,
            **_gguf(base),
        )


def load_generation(base: Base) -> GenerationConfig | None:
    """The base model's generation settings; None where it has no file of them. Raises ModelError."""
    from transformers import GenerationConfig

    location = base.location
    if base.model.gguf_file or (location.folder and not (location.folder / GENERATION).is_file()):
        return None
    with (
        _explained(f"{GENERATION} of the model {location}", location),
        contextlib.suppress(OSError),
    ):  # of the hub, and none there
        return GenerationConfig.from_pretrained(str(location), revision=base.model.revision)
    return None


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether the model is a mixture of experts."""
    text = config.get_text_config()
    return any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def width_of(config: PreTrainedConfig) -> int:
    """The model's hidden size."""
    text = config.get_text_config()
    return int(next(size for key in ("hidden_size", "d_model", "n_embd", "dim") if (size := getattr(text, key, None))))


def load_empty_model(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """The base model's layers without memory for weights (torch's meta device). Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(base)
    with _explained(f"the model {base.location}", base.location), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=base.model.trust_remote_code)


def stored_dtype(base: Base) -> torch.dtype:
    """The data type in which the base model's weights are stored; fp32 where that is not told or is a quantized one.
    Raises ModelError."""
    import torch

    if base.model.gguf_file:
        return torch.float32
    if base.location.folder:
        stored = check_folder(base.location.folder, tokenizer=False).dtype
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(stored, torch.float32)
    return load_config(base).dtype or torch.float32


def check_model(base: Base) -> None:
    """Raise ModelError when only half of the base model is there (models of the hub are not looked into)."""
    if (folder := base.location.folder) and not _gguf(base):
        check_folder(folder, tokenizer=not base.model.tokenizer)
        check_complete(folder, causal=True, trust_remote_code=base.model.trust_remote_code)


def identity(base: Base) -> dict[str, Any]:
    """What tells one base model from another: what the conf calls it, of a folder a fingerprint of its files, and the few
    bits that its weights are trained in, if so."""
    model, folder = base.model, base.location.folder
    named: dict[str, Any] = {"base": model.base, "revision": model.revision, "gguf_file": model.gguf_file}
    named |= {"weights": model.weights} if model.weights else {}
    return named | ({"folder": str(folder), "fingerprint": fingerprint(folder)} if folder else {})


def tokenizer_files(base: Base) -> list[Path]:
    """The files of this machine that decide how text becomes tokens: the conf's chat template, and the tokenizer's
    folder without weights. A hub id has none, and of a GGUF :func:`identity` tells."""
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
    """Make a model that was read from a GGUF and dequantized an ordinary one, which can be trained and saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config


def _gguf(base: Base) -> dict[str, Any]:
    """The option of `from_pretrained` that takes a GGUF, where the conf says so."""
    wanted, folder = base.model.gguf_file, base.location.folder
    if not wanted:
        return {}
    if folder and not (folder / wanted).is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"model.gguf_file: {folder} has no {wanted}; its GGUF files: {found}")
    return {"gguf_file": wanted}


def fingerprint(folder: Path) -> str:
    """Tells one model folder's contents from another's. Texts about a model do not make it."""
    digest = hashlib.sha256()
    for path in sorted(
        p
        for p in folder.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.name not in ("README.md", MADE_BY)
    ):
        digest.update(file_digest(path))
    return digest.hexdigest()


def file_digest(path: Path) -> bytes:
    """Name, size, and first and last MiB of a file: weights are large, and those tell one training's from another's."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        sample = f"{path.name}\0{size}\0".encode()
        for start in (0, max(0, size - _BLOCK)):
            file.seek(start)
            sample += file.read(_BLOCK)
    return sample


@contextlib.contextmanager
def _explained(what: str, location: Location) -> Iterator[None]:
    """Turn whatever transformers raises about a model's files into a ModelError for the user: a damaged one can make it
    raise anything."""
    try:
        with quietly(warnings_too=False):
            yield
    except LlmRayError:
        raise
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded: {_reason(error, location)}") from error


@contextlib.contextmanager
def quietly(warnings_too: bool = True) -> Iterator[None]:
    """transformers' progress bars are off in the block; its warnings and Python's, too, where the user is told in other
    words.

    One thread at a time (LOADING).
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
