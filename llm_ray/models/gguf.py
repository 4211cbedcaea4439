"""Converts a GGUF file to a Hugging Face folder: weights dequantized to fp32, tokenizer, chat template, generation
settings."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_ray.errors import ModelError

# Kinds of end tokens (text, turn, message): https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_ENDS = ("eos", "eot", "eom")


def convert(file: Path, folder: Path) -> str | None:
    """Writes the model of the GGUF `file` into `folder`; returns the name of its licence, or None.

    Raises ModelError if transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from llm_ray.models.load import LOADING, forget_quantization
    from llm_ray.models.tokens import open_tokenizer

    fields = read_fields(file)
    try:
        with LOADING, _bars_on_terminals():
            tokenizer = open_tokenizer(str(file.parent), gguf_file=file.name)
            model, report = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # a broken file can make transformers and gguf raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{file} cannot be read as a model of type {fields.get('general.architecture', '?')}: {reason}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{file} lacks {len(missing)} weights, such as {missing[0]}: it is incomplete")
    forget_quantization(model)
    ends = [tokenizer.eos_token_id, *(fields.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS)]
    ids = list(dict.fromkeys(end for end in ends if end is not None))
    settings = model.generation_config
    settings.bos_token_id = tokenizer.bos_token_id
    settings.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    settings.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with LOADING, _bars_on_terminals():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    licence = fields.get("general.license")
    return str(licence) if licence else None


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Shows tqdm's progress bars only on a terminal: their redrawing would fill a log file."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def read_fields(file: Path) -> dict[str, Any]:
    """Returns the metadata of a GGUF without its long lists. Raises ModelError if it is not a complete GGUF."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        return {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    except Exception as error:  # numpy and Python raise many kinds of errors for invalid bytes
        raise ModelError(f"{file} is not a complete GGUF file ({error}): copy or download it again") from error
