"""What is told of a folder in OpenVINO form, and how damaged ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import openvino
import pytest
from click.testing import CliRunner
from openvino import opset13

from llm_ray.cli.model import model as command
from llm_ray.errors import ModelError
from llm_ray.models.folder import check_folder
from llm_ray.models.openvino import check_model_folder, is_openvino, openvino_weights

GRAPH, BINARY = "openvino_model.xml", "openvino_model.bin"


def write(folder: Path, *types: str) -> Path:
    """A model of matrices of 16 x 32 numbers in these types, each with a scale a row, as compressed weights have."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    rows = opset13.parameter([16, 1], numpy.float32)
    node = rows
    for kind in types:
        matrix = openvino.op.Constant(getattr(openvino.Type, kind), openvino.Shape([16, 32]), [1.0] * 512)
        scale = opset13.constant(numpy.full((16, 1), 0.5, dtype=numpy.float32))
        node = opset13.add(node, opset13.multiply(opset13.convert(matrix, "f32"), scale))
    openvino.save_model(openvino.Model([opset13.result(node)], [rows]), folder / GRAPH, compress_to_fp16=False)
    return folder


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("f32", "fp32"),
        ("f16", "bf16"),
        ("bf16", "bf16"),
        ("u8", "int8"),
        ("i8", "int8"),
        ("u4", "int4"),
        ("i4", "int4"),
    ],
)
def test_the_form_of_weights_is_read_from_the_graph(tmp_path: Path, kind: str, weights: str) -> None:
    found = openvino_weights(write(tmp_path / "model", kind))
    assert (found.parameters, found.dtype) == (16 * 32, weights), "scales are no parameters"


def test_the_form_is_that_of_most_weights(tmp_path: Path) -> None:
    found = openvino_weights(write(tmp_path / "model", "u4", "u8", "u4"))
    assert (found.parameters, found.dtype) == (3 * 16 * 32, "int4")


def test_both_forms_are_models(tmp_path: Path, tiny: Path) -> None:
    folder = write(tmp_path / "model", "u8")
    assert is_openvino(folder)
    assert not is_openvino(tiny)
    assert check_model_folder(folder).dtype == "int8"
    assert check_model_folder(tiny) == check_folder(tiny)


@pytest.mark.parametrize("keep", [0, 100])
def test_weights_cut_off(tmp_path: Path, keep: int) -> None:
    folder = write(tmp_path / "model", "f32")
    with (folder / BINARY).open("r+b") as file:
        file.truncate(keep)
    with pytest.raises(ModelError, match=r"openvino_model\.bin is missing or truncated \([\d,]+ bytes expected\)"):
        openvino_weights(folder)
    (folder / BINARY).unlink()
    with pytest.raises(ModelError, match="is missing or truncated"):
        openvino_weights(folder)


@pytest.mark.parametrize("text", [b"", b"<net></net>", b"\xff\xfe", None])
def test_no_graph(tmp_path: Path, text: bytes | None) -> None:
    folder = write(tmp_path / "model", "f32")
    whole = (folder / GRAPH).read_bytes()
    (folder / GRAPH).write_bytes(whole[: len(whole) // 2] if text is None else text)
    with pytest.raises(ModelError, match=r"openvino_model\.xml (is not a complete OpenVINO model|cannot be read)"):
        openvino_weights(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        openvino_weights(folder)


def test_training_on_one_is_refused_in_these_words(tmp_path: Path, tiny: Path) -> None:
    folder = write(tmp_path / "model", "u8")
    shutil.copy2(tiny / "tokenizer.json", folder)
    with pytest.raises(
        ModelError, match=r"OpenVINO form, which only engine openvino reads.*use the model that it was made from"
    ):
        check_folder(folder)


def test_the_registry_lists_and_exports_it(tmp_path: Path, tiny: Path) -> None:
    folder = write(tmp_path / "models" / "tiny-openvino-int8", "u8")
    (folder / "llm-ray.json").write_text(json.dumps({"source": "/srv/tiny", "licence": "mit"}))
    shutil.copy2(tiny / "chat_template.jinja", folder)
    options = ["--models", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    (info,) = json.loads(CliRunner().invoke(command, ["list", "--json", *options]).stdout)
    assert info["problem"] is None
    assert (info["name"], info["dtype"], info["source"], info["licence"]) == (
        "tiny-openvino-int8",
        "int8",
        "/srv/tiny",
        "mit",
    )
    assert info["chat_template"]
    done = CliRunner().invoke(command, ["export", "tiny-openvino-int8", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / BINARY).read_bytes() == (folder / BINARY).read_bytes()
