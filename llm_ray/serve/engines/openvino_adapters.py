"""Converts PEFT's LoRA adapters to OpenVINO GenAI's form.

GenAI does not read adapter_config.json and has one scale for a whole adapter. Here each layer's own scale (alpha /
rank, or alpha / sqrt(rank) with rsLoRA, with its alpha_pattern) is multiplied into its matrix B.
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
"""Output and input size of each layer, by its name."""


def read_adapter(folder: Path, layers: Sizes) -> genai.Adapter:
    """Reads the adapter in PEFT's folder for a model with these layers.

    Raises ValueError if the adapter changes any other layer, which GenAI would silently ignore, or has another size.
    """
    config = read_json(folder / CONFIG)
    tensors = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = PART.fullmatch(name)
            if part is None or part["layer"] not in layers:
                raise ValueError(f"{folder / WEIGHTS} has {name}, to which engine openvino applies no adapter")
            matrix = file.get_tensor(name).to(torch.float32)
            out_size, in_size = layers[part["layer"]]
            is_b = part["side"] == "B.weight"
            if matrix.shape[0 if is_b else 1] != (out_size if is_b else in_size):
                raise ValueError(f"{folder / WEIGHTS} has {name} of size {tuple(matrix.shape)}")
            tensors[name] = matrix * scale(config, part["layer"], matrix.shape[1]) if is_b else matrix
    return _adapter(tensors)


def frame(layers: Sizes) -> genai.Adapter:
    """Returns an adapter without effect. Given to a pipeline at construction, it prepares these layers for other
    adapters.

    GenAI applies an adapter only to layers that the adapters given at construction have.
    """
    return _adapter(
        {
            f"base_model.model.{layer}.lora_{side}.weight": torch.zeros(size)
            for layer, (out_size, in_size) in layers.items()
            for side, size in (("A", (1, in_size)), ("B", (out_size, 1)))
        }
    )


def scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Returns the factor by which PEFT scales an adapter's output for a layer."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)),
        config.get("lora_alpha", 8),
    )
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _adapter(tensors: dict[str, torch.Tensor]) -> genai.Adapter:
    return genai.Adapter(ov.Tensor(np.frombuffer(save(tensors), dtype=np.uint8).copy()))
