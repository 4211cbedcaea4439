"""Whether a model folder has every weight of its architecture, in its size, before anything is loaded.

transformers is asked itself, by loading the folder onto torch's meta device: names and shapes are read from the files' headers, and all its
rules hold: tied weights, weights that may be missing, names that it changes, prefixes, experts that it stacks. It takes a moment, and no
memory. Left out are quantized weights, whose names and shapes are those of their method, and models with Python code of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.errors import ModelError
from llm_ray.models.folder import CONFIG, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AGAIN = "copy or download it again, or name another"


def check_complete(path: Path, causal: bool = False, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """Raise ModelError unless the folder `path` has every weight of its architecture, or with `causal` of the model that writes text.

    Returns the model without its weights; None where it was not looked at, or transformers cannot make it from its configuration:
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
            raise ModelError(f"the model {path} lacks parts of its experts, or has them in other sizes than the rest: {_AGAIN}") from error
        return None
    missing = report["missing_keys"]
    if not causal:  # of encoders, which are used without it
        missing = {name for name in missing if "pooler" not in name.split(".")}
    refuse_missing(str(path), model, missing)
    if wrong := sorted(report["mismatched_keys"]):
        name, has, wants = wrong[0]
        raise ModelError(
            f"the model {path}: {len(wrong)} of its weights are of other sizes than its {CONFIG} says, as {name}, which is {_size(has)} and should "
            f"be {_size(wants)}: one of them is another model's"
        )
    return model


def refuse_missing(called: str, model: object, missing: Collection[str]) -> None:
    """Raise ModelError where weights of a loaded model are missing: transformers goes on with random numbers in their place."""
    if missing:
        raise ModelError(
            f"the model {called} lacks {len(missing)} weights of a {type(model).__name__}, as {sorted(missing)[0]}: it is half a model, or "
            f"none that writes text; {_AGAIN}"
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
