"""Checks that a model folder has every weight of its architecture, in the right size, before anything is loaded.

transformers does the check itself by loading the folder onto torch's meta device: it reads names and shapes from the
files' headers and applies all its rules (tied weights, optional weights, renamed weights, prefixes, stacked experts).
This takes a moment and no memory; values are read only for tied weights that are stored twice. Not checked are
quantized weights, whose names and shapes depend on the method, and models with their own Python code.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.errors import ModelError
from llm_ray.models.folder import CONFIG, read_json, weight_files

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_LAYER = re.compile(r"((.*?\.)\d+\.)(.*)")
_AGAIN = "copy or download it again, or use another model"


def check_complete(path: Path, causal: bool = False, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """Raises ModelError unless the folder `path` has every weight of its architecture; with `causal`, of the causal
    language model.

    Returns the model without its weights. Returns None if the model is not checked, or transformers cannot build it
    from its configuration: loading it later explains why.
    """
    config = read_json(path / CONFIG)
    if "quantization_config" in config or (trust_remote_code and "auto_map" in config):
        return None
    import torch

    from llm_ray.models.load import quietly

    kind = _class(config, causal)
    if kind is None:
        return None
    try:
        with quietly(), torch.no_grad():
            model, report = kind.from_pretrained(
                path,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
            )
    except Exception as error:
        if "conversion of the weights" in str(error):  # some experts lack a part or differ in size
            raise ModelError(
                f"the model {path} lacks parts of its experts, or has them in inconsistent sizes: {_AGAIN}"
            ) from error
        return None
    missing = report["missing_keys"]
    if not causal:  # encoders are used without their pooler
        missing = {name for name in missing if "pooler" not in name.split(".")}
    refuse_missing(str(path), model, missing)
    if wrong := sorted(report["mismatched_keys"]):
        name, has, wants = wrong[0]
        raise ModelError(
            f"the model {path}: {len(wrong)} of its weights differ in size from its {CONFIG}, such as {name}, which "
            f"is {_size(has)} and should be {_size(wants)}: one of them belongs to another model"
        )
    _refuse_more_layers(path, model, report["unexpected_keys"])
    _refuse_untied(path, model)
    return model


def _refuse_more_layers(path: Path, model: PreTrainedModel, unexpected: Collection[str]) -> None:
    """Raises ModelError for weights of more layers than the configuration has: transformers would ignore them."""
    names = model.state_dict().keys()
    layers, alike = ({_LAYER.sub(form, name) for name in names} for form in (r"\1", r"\2*.\3"))
    if more := sorted(
        name for name in unexpected if _LAYER.sub(r"\2*.\3", name) in alike and _LAYER.sub(r"\1", name) not in layers
    ):
        raise ModelError(
            f"the model {path} has weights of more layers than its {CONFIG} says, such as {more[0]}: one of them "
            f"belongs to another model; {_AGAIN}"
        )


def _refuse_untied(path: Path, model: PreTrainedModel) -> None:
    """Raises ModelError if tied weights are stored separately with different values: engines differ in which one they
    read."""
    for name, source in model.all_tied_weights_keys.items():
        if model.get_parameter(name) is model.get_parameter(source):
            continue
        stored = [tensor for file in weight_files(path) for tensor in _read(file, (name, source))]
        if len(stored) == 2 and not stored[0].equal(stored[1]):
            raise ModelError(
                f"the model {path}: {name} differs from {source}, although its {CONFIG} ties them, and engines "
                f"differ in which they read: set tie_word_embeddings to false there, or remove {name} from the "
                "weights"
            )


def _read(file: Path, names: Collection[str]) -> list[Tensor]:
    """Returns those of the named tensors that the file contains."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return [tensors.get_tensor(name) for name in set(names).intersection(tensors.keys())]


def refuse_missing(called: str, model: object, missing: Collection[str]) -> None:
    """Raises ModelError if weights of a loaded model are missing: transformers initializes them at random."""
    if missing:
        raise ModelError(
            f"the model {called} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{sorted(missing)[0]}: it is incomplete, or does not generate text; {_AGAIN}"
        )


def _class(config: dict[str, Any], causal: bool) -> Any:
    """Returns transformers' class for the model; None if it has none."""
    import transformers

    if causal:
        return transformers.AutoModelForCausalLM
    named = next(iter(config.get("architectures") or ["AutoModelForCausalLM"]), "")
    return getattr(transformers, str(named), None)


def _size(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape))
