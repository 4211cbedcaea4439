"""Contents of a folder in OpenVINO form: openvino_model.xml (the graph), openvino_model.bin (the weights), and a
tokenizer.

``llm-ray model convert`` creates such folders; optimum-intel and the hub's organisation OpenVINO provide them too.
"""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from llm_ray.errors import ModelError
from llm_ray.models.folder import CONFIG, OPENVINO, Weights, check_folder, read_json

LINEAGE = "llm-ray.json"
# A constant of the graph: its type, shape, and offset and size in the weights file.
_CONSTANT = re.compile(r'<data element_type="(\w+)" shape="([\d, ]*)" offset="(\d+)" size="(\d+)"')
# A linear layer of the graph: the model's own name of it, its settings, and its inputs. And a size of an input.
_LINEAR = re.compile(
    r'<layer [^>]*name="__module\.([^"]+)/aten::linear/MatMul" type="MatMul"[^>]*>\s*<data ([^>]*)/>\s*'
    r"<input>(.*?)</input>",
    re.DOTALL,
)
_SIZE = re.compile(r"<dim>(\d+)</dim>")
_DTYPE_NAMES = {
    "f32": "fp32",
    "f16": "bf16",
    "bf16": "bf16",
    "i8": "int8",
    "u8": "int8",
    "i4": "int4",
    "u4": "int4",
    "nf4": "int4",
}


def is_openvino(path: Path) -> bool:
    """Whether the folder `path` holds a model in OpenVINO form."""
    return (path / OPENVINO).is_file()


def check_model_folder(path: Path) -> Weights:
    """Returns the weights of a model folder in Hugging Face or OpenVINO form. Raises ModelError if it is incomplete."""
    return openvino_weights(path) if is_openvino(path) else check_folder(path)


def openvino_weights(path: Path) -> Weights:
    """Returns the weights of the OpenVINO folder `path`, with data types as in ``--weights`` (16-bit ones are bf16).
    Raises ModelError unless the configuration, the graph and all weights that it names are there."""
    read_json(path / CONFIG)
    graph, binary = path / OPENVINO, (path / OPENVINO).with_suffix(".bin")
    try:
        text = graph.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{graph} cannot be read ({error}): convert or copy the model again") from error
    counts, end = Counter[str](), 0
    for kind, sizes, offset, size in _CONSTANT.findall(text):
        end = max(end, int(offset) + int(size))
        shape = [int(part) for part in sizes.split(",") if part.strip()]
        if (
            kind in _DTYPE_NAMES and shape and shape[-1] > 1
        ):  # skips scales and zero points of compressed weights, one per row
            counts[_DTYPE_NAMES[kind]] += prod(shape)
    if not counts or not text.rstrip().endswith("</net>"):
        raise ModelError(f"{graph} is not a complete OpenVINO model: convert or copy it again")
    if not binary.is_file() or binary.stat().st_size < end:
        raise ModelError(f"{binary} is missing or truncated ({end:,} bytes expected): convert or copy the model again")
    return Weights(counts.total(), counts.most_common(1)[0][0])


def adaptable_layers(path: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of the model in the OpenVINO folder `path` to which an adapter can be applied, with the sizes
    of what they give and take: those of the model's numbered blocks, but for experts."""
    found = {}
    for layer, data, inputs in _LINEAR.findall((path / OPENVINO).read_text(encoding="utf-8")):
        parts = layer.split(".")
        sizes = [int(size) for size in _SIZE.findall(inputs.split("</port>")[1])]
        if "experts" not in parts and any(map(str.isdigit, parts)) and len(sizes) == 2:
            gives, takes = sizes if 'transpose_b="true"' in data else reversed(sizes)
            found[layer] = gives, takes
    return found


def lineage(path: Path) -> dict[str, Any]:
    """Returns the recorded origin of the model in `path`; empty if none is recorded. Raises ModelError."""
    return read_json(path / LINEAGE) if (path / LINEAGE).is_file() else {}


def original(path: Path) -> Path:
    """The folder that the model in the folder `path` was converted from, where it is still there; else `path`."""
    source = Path(lineage(path).get("source", path)) if is_openvino(path) else path
    return source if (source / CONFIG).is_file() else path
