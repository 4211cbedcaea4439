"""Checks that a model folder has every weight of its architecture, in the right size, before anything is loaded.

transformers is asked itself, by loading the folder onto torch's meta device: names and shapes are read from the files'
headers, and all its rules hold: tied weights, weights that may be missing, names that it changes, prefixes, experts
that it stacks. It takes a moment, and no memory; values are read of weights alone that are stored twice though they are
tied. Left out are quantized weights, whose names and shapes are those of their method, and models with Python code of
their own.
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
    """Raise ModelError unless the folder `path` has every weight of its architecture, or with `causal` of the model
    that writes text.

    Returns the model without its weights; None where it was not looked at, or transformers cannot make it from its
    configuration:
    whoever is to load it says why.
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
        if "conversion of the weights" in str(error):  # experts, of which some lack a part, or have it in another size
            raise ModelError(
                f"the model {path} lacks parts of its experts, or has them in inconsistent sizes: {_AGAIN}"
            ) from error
        return None
    missing = report["missing_keys"]
    if not causal:  # of encoders, which are used without it
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
    """Raise ModelError for weights of layers beyond those that the configuration has: transformers would leave them
    out."""
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
    """Raise ModelError where weights that the configuration ties are stored each with values of its own: engines differ
    in which they read."""
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
    """Those of the tensors that the file holds."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return [tensors.get_tensor(name) for name in set(names).intersection(tensors.keys())]


def refuse_missing(called: str, model: object, missing: Collection[str]) -> None:
    """Raise ModelError where weights of a loaded model are missing: transformers goes on with random numbers in their
    place."""
    if missing:
        raise ModelError(
            f"the model {called} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{sorted(missing)[0]}: it is incomplete, or does not generate text; {_AGAIN}"
        )


def _class(config: dict[str, Any], causal: bool) -> Any:
    """transformers' class for the model; None where it has none."""
    import transformers

    if causal:
        return transformers.AutoModelForCausalLM
    named = next(iter(config.get("architectures") or ["AutoModelForCausalLM"]), "")
    return getattr(transformers, str(named), None)


def _size(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape))
