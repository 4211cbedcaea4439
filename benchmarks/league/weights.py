"""Sizes of weights in the servers' forms, and requantization of GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.errors import ModelError
from llm_ray.models.folder import CONFIG, OPENVINO, check_folder, read_json

DTYPES = {"fp32": 4, "bf16": 2}
"""Bytes per unquantized weight."""


@dataclass(frozen=True)
class Shape:
    """The properties of a model that determine how much it computes and reads."""

    parameters: int
    head: int
    """Weights of the output layer."""
    tied: bool
    """Whether the output layer is also the embedding table, stored once."""
    kv_values: int
    """Numbers in the cache per token: keys and values of all layers."""

    @property
    def used(self) -> int:
        """Weights used for a token: all but the embedding table, of which one row is read."""
        return self.parameters - (0 if self.tied else self.head)


def shape(model: Path) -> Shape:
    """Returns the shape of the Hugging Face model in the folder `model`. Raises ModelError."""
    config = read_json(model / CONFIG)
    config = config.get("text_config") or config
    needed = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        raise ModelError(f"{model / CONFIG} has no {missing[0]}: the league requires models described by it")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return Shape(
        parameters=check_folder(model).parameters,
        head=config["vocab_size"] * config["hidden_size"],
        tied=bool(config.get("tie_word_embeddings", True)),
        kv_values=2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width,
    )


def step_bytes(of: Shape, stored: int) -> int:
    """Returns the bytes read per decoding step, for `stored` bytes of weights."""
    return round(stored * of.used / of.parameters)


def stored_bytes(path: Path, form: str, of: Shape) -> int:
    """Returns the bytes of the weights at `path` (a folder in Hugging Face or OpenVINO form, a GGUF) as a server stores
    them."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
    if (path / OPENVINO).is_file():
        return (path / OPENVINO).with_suffix(".bin").stat().st_size
    return of.parameters * DTYPES[form]


def requantize(source: Path, target: Path, quantization: str) -> None:
    """Writes the GGUF `source` to `target` with its matrices in `quantization`, such as "Q8_0"; vectors are unchanged.
    Raises NotImplementedError for a quantization that the package gguf cannot write."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[quantization]
    reader = GGUFReader(source)
    fields: dict[str, Any] = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = GGUFWriter(target, fields.pop("general.architecture").contents())
    fields.pop("general.file_type", None)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{quantization}"])
    for name, field in fields.items():
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            data = quantize(dequantize(tensor.data, tensor.tensor_type), kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
