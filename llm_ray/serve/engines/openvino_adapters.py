"""LoRA adapters in the form that OpenVINO GenAI takes.

GenAI reads no adapter_config.json and has one factor for a whole adapter: here each layer's own factor (alpha / rank,
or alpha / sqrt(rank) with rsLoRA, by its patterns) is multiplied into its matrix B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
import torch
from safetensors import safe_open
from safetensors.torch import save

from llm_ray.models.folder import read_json
from llm_ray.serve.deployments.adapters import CONFIG, PART, WEIGHTS

Sizes = Mapping[str, tuple[int, int]]
"""What each layer gives and takes, by its name."""


def read_adapter(folder: Path, layers: Sizes) -> genai.Adapter:
    """The adapter in PEFT's folder, for a model with these layers.

    Raises ValueError where it changes others, of which GenAI would leave out one without a word.
    """
    config = read_json(folder / CONFIG)
    tensors = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = PART.fullmatch(name)
            if part is None or part["layer"] not in layers:
                raise ValueError(f"{folder / WEIGHTS} has {name}, to which engine openvino applies no adapter")
            matrix = file.get_tensor(name).to(torch.float32)
            gives, takes = layers[part["layer"]]
            is_b = part["side"] == "B.weight"
            if matrix.shape[0 if is_b else 1] != (gives if is_b else takes):
                raise ValueError(f"{folder / WEIGHTS} has {name} of size {tuple(matrix.shape)}")
            tensors[name] = matrix * scale(config, part["layer"], matrix.shape[1]) if is_b else matrix
    return _adapter(tensors)


def frame(layers: Sizes) -> genai.Adapter:
    """An adapter that changes nothing: given to a pipeline as it is made, it makes room in these layers for others.

    One that has layers besides those of the adapters that a pipeline was made with is applied only in part.
    """
    return _adapter(
        {
            f"base_model.model.{layer}.lora_{side}.weight": torch.zeros(size)
            for layer, (gives, takes) in layers.items()
            for side, size in (("A", (1, takes)), ("B", (gives, 1)))
        }
    )


def scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor by which PEFT multiplies what an adapter adds to a layer."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)),
        config.get("lora_alpha", 8),
    )
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _adapter(tensors: dict[str, torch.Tensor]) -> genai.Adapter:
    return genai.Adapter(ov.Tensor(np.frombuffer(save(tensors), dtype=np.uint8).copy()))
